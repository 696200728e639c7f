"""Medical questions from many files in one table, split so that no near-duplicate stands on both sides.

Also: contamination of the test questions, problem types of open questions, and the data card.
"""

from medkit.data.contamination import clean_mask, contamination_table, find_contamination
from medkit.data.data_card import build_card, seen_notes
from medkit.data.instructions import prompt_texts
from medkit.data.near_duplicates import group_near_duplicates
from medkit.data.plots import plot_confusions, plot_places_and_subjects, plot_sizes_and_lengths
from medkit.data.problem_types import agreement, classify_by_keywords, join_labels, measure_keywords
from medkit.data.raw_questions import DataError
from medkit.data.readers import read_dialogues, read_open_questions
from medkit.data.splits import assign_pools, drop_long, load_questions, take_splits, training_rows, transfer_answers
