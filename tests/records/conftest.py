"""The tests are imported one by one, not as a package; this lets them share their examples."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
