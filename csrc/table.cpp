// One instruction set's kernels as a table: compiled once per instruction set.
#include "gemm/gemm.h"

// Where the kernels are that multiply by the tile unit, but not by bf16's dot product.
#if BIGMODEL_AMX
#define BIGMODEL_UNIT BIGMODEL_ISA
#else
#define BIGMODEL_UNIT BIGMODEL_REST
#endif

namespace bigmodel::BIGMODEL_ISA {

void pack(const Runtime&, const PackArgs&);
void linear(const Runtime&, const LinearArgs&);
void feed_forward(const Runtime&, const FeedForwardArgs&);

}  // namespace bigmodel::BIGMODEL_ISA

namespace bigmodel::BIGMODEL_UNIT {

void linear_backward(const Runtime&, const LinearBackwardArgs&);
void feed_forward_backward(const Runtime&, const FeedForwardBackwardArgs&);
void cross_entropy(const Runtime&, const CrossEntropyArgs&);
void attention(const Runtime&, const AttentionArgs&);
void attention_backward(const Runtime&, const AttentionBackwardArgs&);

}  // namespace bigmodel::BIGMODEL_UNIT

namespace bigmodel::BIGMODEL_REST {

void layer_norm(const Runtime&, const LayerNormArgs&);
void norm_backward(const Runtime&, const NormBackwardArgs&);
void embedding(const Runtime&, const EmbeddingArgs&);
void embedding_backward(const Runtime&, const EmbeddingBackwardArgs&);
void rotary(const Runtime&, const RotaryArgs&);
void add(const Runtime&, const AddArgs&);
void attention_maps(const Runtime&, const AttentionMapsArgs&);
void philox_block(const PhiloxArgs&);

}  // namespace bigmodel::BIGMODEL_REST

namespace bigmodel::BIGMODEL_ISA {

#define BIGMODEL_NAME_OF(isa) #isa
#define BIGMODEL_NAME(isa) BIGMODEL_NAME_OF(isa)

namespace unit = bigmodel::BIGMODEL_UNIT;

extern const KernelTable table;
const KernelTable table = {BIGMODEL_NAME(BIGMODEL_ISA), panel, BIGMODEL_BF16_DOT != 0, pack, linear, feed_forward, unit::linear_backward,
                           unit::feed_forward_backward, rest::layer_norm, rest::norm_backward, rest::embedding, rest::embedding_backward,
                           rest::rotary, rest::add, unit::cross_entropy, unit::attention, unit::attention_backward, rest::attention_maps,
                           rest::philox_block};

}  // namespace bigmodel::BIGMODEL_ISA
