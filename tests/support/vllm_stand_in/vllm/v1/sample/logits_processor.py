class AdapterLogitsProcessor:
    pass
