from subquad.ops.merge import merge as merge
from subquad.ops.moments import (
    Moments as Moments,
)  # fmt: skip
from subquad.ops.moments import (
    apply_moments as apply_moments,
)
from subquad.ops.moments import (
    gather_moments as gather_moments,
)
from subquad.ops.moments import (
    mean_features as mean_features,
)
from subquad.ops.moments import (
    moment_attention as moment_attention,
)
from subquad.ops.sparse import Layout as Layout
from subquad.ops.sparse import RelativeBias as RelativeBias
from subquad.ops.sparse import sparse_attention as sparse_attention
