"""The tests are imported one by one, not as a package; this lets them share their examples."""

import sys
from pathlib import Path

from hypothesis import settings

# A loaded machine is slow, and that is no fault of the code under test.
settings.register_profile("records", deadline=None)
settings.load_profile("records")
sys.path.insert(0, str(Path(__file__).parent))
