"""Print as JSON every launch that `lion-fast check` and the model make on a GPU: name, kernel, types and calls.

Run this without `TRITON_INTERPRET`.
"""

import json

from lion_fast.check.model_launches import recorded_launches

print(
    json.dumps(
        [
            {"name": spec.name, "kernel": spec.kernel_name, "types": spec.types, "calls": spec.calls}
            for spec in recorded_launches()
        ]
    )
)
