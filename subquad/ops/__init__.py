from subquad.ops.merge import merge as merge
from subquad.ops.sparse import Layout as Layout, RelativeBias as RelativeBias, sparse_attention as sparse_attention
