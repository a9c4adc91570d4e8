// One instruction set's kernels as a table: compiled once per instruction set.
#include "gemm/gemm.h"

namespace bigmodel::BIGMODEL_ISA {

void pack(const Runtime&, const PackArgs&);
void linear(const Runtime&, const LinearArgs&);
void feed_forward(const Runtime&, const FeedForwardArgs&);
void linear_backward(const Runtime&, const LinearBackwardArgs&);
void feed_forward_backward(const Runtime&, const FeedForwardBackwardArgs&);
void layer_norm(const Runtime&, const LayerNormArgs&);
void norm_backward(const Runtime&, const NormBackwardArgs&);
void embedding(const Runtime&, const EmbeddingArgs&);
void embedding_backward(const Runtime&, const EmbeddingBackwardArgs&);
void cross_entropy(const Runtime&, const CrossEntropyArgs&);
void attention(const Runtime&, const AttentionArgs&);
void attention_backward(const Runtime&, const AttentionBackwardArgs&);
void philox_block(const PhiloxArgs&);

#define BIGMODEL_NAME_OF(isa) #isa
#define BIGMODEL_NAME(isa) BIGMODEL_NAME_OF(isa)

extern const KernelTable table;
const KernelTable table = {BIGMODEL_NAME(BIGMODEL_ISA), panel, BIGMODEL_BF16_DOT != 0, pack, linear, feed_forward, linear_backward, feed_forward_backward, layer_norm, norm_backward, embedding, embedding_backward, cross_entropy, attention,
                           attention_backward, philox_block};

}  // namespace bigmodel::BIGMODEL_ISA
