"""Pictures of what concepts see and say (paper, Figures 4 and 5).

``python -m vcr_ops.viz IMAGE... --checkpoint FILE --out DIR`` draws attention maps over the images, edges, and states
as PNGs with one HTML page. It takes matplotlib, Pillow and scikit-learn: ``pip install 'vcr-ops[viz]'``.
"""

from .page import draw

__all__ = ["draw"]
