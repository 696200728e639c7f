"""The thin package behind the notebooks. Import the room you need: `from medkit import evaluation`."""

__version__ = "0.1.0"
