"""The gallery's examples, one file each; `test_index` and `test_glance` have the page that shows them."""

from bayes_klrl.gallery.finding import Finding


def is_short(finding: Finding, most: int = 70) -> bool:
    """Whether what an example says of itself can be read on the gallery's page: about 60 words for each side."""
    return max(len(words.split()) for words in (finding.better, finding.worse)) <= most
