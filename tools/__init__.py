"""How the book is made: its data and weights, its measurements, its pages."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
