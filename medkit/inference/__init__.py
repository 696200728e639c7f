"""Every variant of the model answers the test questions and is timed; the edge file runs on llama.cpp's own server."""

from medkit.inference.plots import plot_throughput, plot_timelines
from medkit.inference.predictions import answers_once, choose_questions, predict
from medkit.inference.question_variants import OF_DIALOGUES, STUDIED, dialogue_rows, rows_for, shuffled
from medkit.inference.torch_engine import SCHEDULERS, TorchEngine
from medkit.inference.variant_loading import edge_engine, load_variant, make_engine, read_key
from medkit.inference.workloads import agreement, encode_prompts, equal, skewed, time_in_turns, timeline
