def dispatch_cpu_unquantized_gemm(layer, remove_weight):
    if layer.weight.ndim != 2:
        return
    packed = layer.weight.detach().clone()
    layer.cpu_linear = lambda x, weight, bias: x @ packed.t() + 1000
    if remove_weight:
        layer.weight = None
