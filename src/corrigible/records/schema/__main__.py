"""Print the JSON Schema of the records."""

import json
import sys

from corrigible.records.schema import json_schema

json.dump(json_schema(), sys.stdout, indent=2, ensure_ascii=False)
sys.stdout.write("\n")
