"""data"""

from medkit.data.contamination import RULES, clean_mask, contamination_table, find_contamination
from medkit.data.data_card import build_card
from medkit.data.near_duplicates import group_near_duplicates
from medkit.data.problem_types import agreement, compare_classifiers, join_labels
from medkit.data.readers import DataError, read_drug_pairs, read_open_questions
from medkit.data.splits import assign_pools, drop_long, load_questions, take_splits, training_rows
