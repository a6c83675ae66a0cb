// The CPU's kernel set, in plain C++17 without torch: it compiles in seconds, and one source serves every torch.
// reference.py says what each function computes, ops.py in which order.
//
// ops.py calls the functions marked EXPORT. Their outputs are contiguous. They return null, or a sentence that says
// what is wrong with the input.

#include "attention.h"
#include "gemm.h"
#include "pointwise.h"
#include "rows.h"
