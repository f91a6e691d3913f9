"""Data that other packages ship, read for the examples: `verses`, `novels`, `questions`. Read `verses` first."""
