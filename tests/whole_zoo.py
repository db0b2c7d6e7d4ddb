"""Every architecture: what the general tests run on. A new one joins here."""

from zoo import BLIP
from zoo_albef import ALBEF
from zoo_clip import CLIP
from zoo_llava import LLAVA

# A stack that reads another through cross-attention.
FUSED = [*BLIP, *ALBEF]
ZOO = [*FUSED, *CLIP, *LLAVA]
