"""How many parameters a face model has, and how many of them are trained."""

from vitface.model.face import FaceModel


def parameter_counts(model: FaceModel) -> dict[str, tuple[int, int]]:
    """(total, trainable) parameters of "backbone", "adapters", "router", "head" and "all"."""
    counts = {part: (0, 0) for part in ("backbone", "adapters", "router", "head", "all")}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0] if not name.startswith("vit.") else "adapters" if "lora_" in name else "backbone"
        part = "head" if name.startswith("vit.pool.") and parameter.requires_grad else part
        for key in (part, "all"):
            total, trained = counts[key]
            counts[key] = total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad
    return counts
