"""`Localization`, the result for one image and its prompts. How it is drawn: `drawing`."""

from open_gem.localization.result import ABSENT as ABSENT
from open_gem.localization.result import INSTANCES as INSTANCES
from open_gem.localization.result import MIN_AREA as MIN_AREA
from open_gem.localization.result import PRESENCE as PRESENCE
from open_gem.localization.result import SCALES as SCALES
from open_gem.localization.result import Localization as Localization
from open_gem.localization.result import Maps as Maps
from open_gem.localization.result import check_absent as check_absent
