"""The shipped examples: what they promise of their prompts."""

from bayes_klrl.cli.demo.openings import TRAINING, UNSEEN


def test_openings_are_sixty_four_different_plain_texts() -> None:
    assert len(TRAINING) == len(UNSEEN) == 32
    everything = [*TRAINING, *UNSEEN]
    assert len(set(everything)) == 64
    assert all(text.isascii() and text == text.strip() and len(text) < 60 for text in everything)
