"""numpy, imported when it is first used.

It takes 0.1 to 0.2 s to import, half of what `inspect` or a contract check may take, and neither
needs it: they read headers and a few small tensors. Modules on their way say
`from qconvert.lazy import np`; those that compute anyway import numpy itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
else:

    class _Numpy:
        def __getattr__(self, name: str) -> Any:
            import numpy

            return getattr(numpy, name)

    np = _Numpy()

__all__ = ["np"]
