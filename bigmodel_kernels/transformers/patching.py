"""`patch`, `unpatch`, `patched` and `explain`.

A module is patched by giving the instance another class: a subclass of its own, named at the top of a module,
with another `forward`. So `isinstance`, pickle, deepcopy, `state_dict` and hooks go on working, weights are
the same tensors, no class or global of transformers changes, and taking the subclass away again restores
everything. The models themselves (BertModel, ...) keep their class: transformers keys behaviour and saved
names on it. What they need to know - that masks may stay two-dimensional - they read from their config, which
they see through a view (see config_view).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bigmodel_kernels import backends
from bigmodel_kernels.ops.examples import example
from bigmodel_kernels.transformers import checks, config_view, continuous_batching, families, report
from bigmodel_kernels.transformers.autoregister import register
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.release import restore_weights
from bigmodel_kernels.transformers.report import PatchReport, Row


def patch(model: nn.Module, *, recompute: bool = False, fused_loss: bool = False) -> PatchReport:
    """Lets the model's modules run our operators, in place, and says what became of each.

    model: a transformers model, or any module that holds one, of the families BERT, RoBERTa, XLM-RoBERTa,
    CamemBERT, ELECTRA, DistilBERT, ALBERT, MPNet, DeBERTa v2, ModernBERT, ViT, DeiT, CLIP, SigLIP, GPT-2,
    OPT, GPT-NeoX, GPT-J, CodeGen, GPT-Neo, BLOOM, Falcon, Phi, StarCoder2, StableLM, Llama, Mistral, Mixtral,
    Qwen2, Qwen3, Qwen3-MoE, Gemma 1 to 3, Phi-3, OLMo 2 and 3, Granite, SmolLM3, GPT-OSS, T5, mT5, UMT5,
    BART, mBART, Marian, Pegasus, M2M-100 (NLLB) and Whisper. What is not exactly as known (a subclass, a
    hook, a replaced, quantised or parametrized projection, an activation or a config that the operators do
    not have, weights that are not loaded) is left alone, and the report says why. Modules that are patched
    already stay so. If anything fails on the way, nothing is patched.

    recompute: feed-forward layers do not keep their hidden layer for the backward, which makes it again: less
    memory in training for one more product in each layer. Without it, layers that were told so before keep to
    it until they are unpatched.

    fused_loss: language models (causal, masked, encoder with decoder) compute their loss without logits, in
    training mode and when labels are given by name. Their output then has `logits=None`. Evaluation has
    logits as ever. The report names those that keep them, such as Gemma 2 with its softcap.

    Decoders run our attention in transformers' continuous batching too, see `enable_continuous_batching`.

    Raises TypeError for something that is not a module.
    """
    plan = _plan(model, recompute, fused_loss)
    _apply(plan.changes)
    return plan.report(applied=True)


def unpatch(model: nn.Module) -> int:
    """Gives every patched module its own class and config back, and makes released weights parameters again.
    Of a part of a model too: the rest stays patched, and its masks are again as transformers makes them, as
    long as the whole is not patched anew. Returns how many modules that were.
    """
    _require_module(model)
    restore_weights(model)
    originals = {rule.patched: rule.original for family in families.loaded() for rule in _all_rules(family)}
    restored = 0
    for module in model.modules():
        original = originals.get(checks.unsharded_class(module))
        if original is not None:
            module.__class__ = checks.sharded_like(module, original)
            module.__dict__.pop(checks.RECOMPUTE, None)
            restored += 1
        config = module.__dict__.get("config")
        if config is not None and config_view.is_view(config):
            module.__dict__["config"] = config_view.leave(config)
        if continuous_batching.is_enabled(module):
            continuous_batching.disable(module)
    return restored


@contextlib.contextmanager
def patched(model: nn.Module, *, recompute: bool = False, fused_loss: bool = False) -> Iterator[PatchReport]:
    """`patch` for a `with`, undone at its end; what was patched before stays patched. Yields the report."""
    plan = _plan(model, recompute, fused_loss)
    _apply(plan.changes)
    try:
        yield plan.report(applied=True)
    finally:
        for change in reversed(plan.changes):
            change.undo()


def explain(model: nn.Module) -> PatchReport:
    """The report that `patch` would give, and nothing patched."""
    return _plan(model).report(applied=False)


# ------------------------------------------------------------------------------------------------------------
# changes


@dataclass
class Change:
    """One module's class, or an entry of its `__dict__`, before and after; None stands for no entry."""

    module: nn.Module
    before: Any
    after: Any
    attribute: str | None = None

    def apply(self) -> None:
        self._set(self.after)

    def undo(self) -> None:
        """Restores what was before, unless somebody else has changed it since."""
        now = self._get()
        if now is self.after or config_view.in_one_company(now, self.after):
            self._set(self.before)

    def _get(self) -> Any:
        return type(self.module) if self.attribute is None else self.module.__dict__.get(self.attribute)

    def _set(self, value: Any) -> None:
        if self.attribute is None:
            self.module.__class__ = value
        elif value is None:
            del self.module.__dict__[self.attribute]
        else:
            self.module.__dict__[self.attribute] = value


def _apply(changes: list[Change]) -> None:
    """All, or on an error none."""
    done: list[Change] = []
    try:
        for change in changes:
            change.apply()
            done.append(change)
    except BaseException:
        for change in reversed(done):
            change.undo()
        raise


# ------------------------------------------------------------------------------------------------------------
# the plan


@dataclass
class _Plan:
    model: nn.Module
    changes: list[Change]
    rows: list[Row]
    targets: list[nn.Module]
    recompute: bool = False
    fused_loss: bool = False

    def report(self, applied: bool) -> PatchReport:
        import transformers

        now, most = _packed_bytes(self.targets)
        notes = []
        if not self.rows:
            notes.append(
                f"nothing here is of a known family ({', '.join(families.names())}); "
                "attn_implementation='bigmodel' replaces the attention of any model that calls transformers' "
                "attention interface"
            )
        if any(change.attribute == continuous_batching.ATTRIBUTE for change in self.changes) or any(
            map(continuous_batching.is_enabled, self.model.modules())
        ):
            notes.append(continuous_batching.note())
        return PatchReport(
            model=type(self.model).__name__,
            rows=self.rows,
            packed_bytes=now,
            packed_bytes_at_most=most,
            transformers_version=transformers.__version__,
            torch_version=torch.__version__,
            notes=notes,
            applied=applied,
        )


def _plan(model: nn.Module, recompute: bool = False, fused_loss: bool = False) -> _Plan:
    _require_module(model)
    register()
    plan = _Plan(model, [], [], [], recompute, fused_loss)
    for family in families.loaded():
        _plan_family(plan, family)
    _plan_continuous_batching(plan)
    _rows_for_unfit_families(plan)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    plan.rows.sort(key=lambda row: order[row.name])
    return plan


def _rows_for_unfit_families(plan: _Plan) -> None:
    """A row for each model, in the model, whose family does not fit the installed transformers."""
    reasons = families.unfit()
    covered: tuple[str, ...] = ()
    for name, module in plan.model.named_modules():
        reason = reasons.get(type(module).__module__)
        if reason is not None and not (covered and f"{name}.".startswith(covered)):
            plan.rows.append(Row(name, type(module).__name__, report.LEFT, reason=reason))
            covered = (*covered, f"{name}." if name else "")


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")


def _all_rules(family: Family) -> tuple[Rule | ChildRule, ...]:
    return (*family.rules, *family.children, *family.losses)


def _plan_family(plan: _Plan, family: Family) -> None:
    model = plan.model
    roots = [(name, module) for name, module in model.named_modules() if isinstance(module, family.models)]
    places = _places(model, family)
    patched_classes = {rule.patched for rule in _all_rules(family)}
    covered: list[str] = []
    for name, module in model.named_modules():
        rule = places.get(id(module)) or _rule_for(module, family)
        if _plan_loss(plan, family, rule, name, module):
            rule = None
        if rule is not None:
            if checks.unsharded_class(module) not in patched_classes and type(module) is not rule.original:
                why = checks.reason_for_class(module, rule.original)
                plan.rows.append(Row(name, type(module).__name__, report.LEFT, reason=why or ""))
            else:
                _plan_module(plan, family, rule, name, module)
            if rule.ops or not isinstance(module, family.models):  # a model that packs speaks of its layers
                covered.append(name)
        elif type(module) in family.left:
            plan.rows.append(Row(name, type(module).__name__, report.LEFT, reason=family.left[type(module)]))
            covered.append(name)
    _rows_for_the_rest(plan, family, roots, covered)
    for _, root in roots:
        _plan_config(plan, family, root)


def _plan_loss(
    plan: _Plan, family: Family, rule: Rule | ChildRule | None, name: str, module: nn.Module
) -> bool:
    """Whether the module gets, or has, a form that does without logits, which is then one of `rule` too."""
    for loss in family.losses:
        others = [loss.original]
        if rule is not None and rule.original is loss.original:
            others.append(rule.patched)
        if type(module) is loss.patched or (plan.fused_loss and type(module) in others):
            before = len(plan.changes)
            _plan_module(plan, family, loss, name, module)
            return type(module) is loss.patched or len(plan.changes) > before
    return False


def _places(model: nn.Module, family: Family) -> dict[int, ChildRule]:
    """The rule of each module that has one by its place."""
    places = {}
    for parent in model.modules():
        for rule in family.children:
            if isinstance(parent, rule.parent):
                child: Any = parent
                for part in rule.attribute.split("."):
                    child = child._modules.get(part) if child is not None else None
                if child is not None:
                    places[id(child)] = rule
    return places


def _rule_for(module: nn.Module, family: Family) -> Rule | None:
    for rule in family.rules:
        if isinstance(module, rule.original):
            return rule
    return None


def _plan_module(plan: _Plan, family: Family, rule: Rule | ChildRule, name: str, module: nn.Module) -> None:
    already = type(module) is rule.patched if rule in family.losses else type(module) is not rule.original
    why = None
    if not already:
        why = checks.reason_for_hooks(module) or checks.reason_for_parameters(module)
        if why is None and rule.check is not None:
            why = rule.check(module)
    chosen: tuple[str, ...] = ()
    ops, note = _fused(rule, module)
    if why is None:
        chosen, why = _backends(ops, module)
    if why is not None:
        plan.rows.append(Row(name, rule.original.__name__, report.LEFT, reason=why))
        return
    if "feed_forward" in ops:
        if plan.recompute and not checks.recomputes(module):
            plan.changes.append(Change(module, None, True, checks.RECOMPUTE))
        if plan.recompute or checks.recomputes(module):
            note = "; ".join(part for part in (note, "makes its hidden layer again in the backward") if part)
    if already and (now := _falls_back(plan.model, rule, module)) is not None:
        note = "; ".join(part for part in (note, f"its own code runs where this needs it: {now}") if part)
    status = report.ALREADY if already else report.PATCHED
    plan.rows.append(Row(name, rule.original.__name__, status, ops, chosen, note))
    if rule not in family.losses:  # their projections are targets of their own
        plan.targets.append(module)
    if not already:
        plan.changes.append(Change(module, type(module), rule.patched))


def _falls_back(model: nn.Module, rule: Rule | ChildRule, module: nn.Module) -> str | None:
    """What has happened to a patched module since (hooks, tensor parallel projections), if anything has."""
    if any(checks.is_sharded_class(type(part)) for part in model.modules()):
        return None  # parameters are gathered, and plain, when the module runs
    why = checks.reason_for_hooks(module) or checks.reason_for_parameters(module)
    return rule.check(module) if why is None and rule.check is not None else why


def _fused(rule: Rule | ChildRule, module: nn.Module) -> tuple[tuple[str, ...], str]:
    """The operators that a module with the adapters that it has will run, and what to say of it."""
    adapted = [name for name in rule.projections if checks.is_lora(module.get_submodule(name))]
    if not adapted:
        return rule.ops, rule.note
    ops, note = rule.ops, "called as they are" if len(adapted) > 1 else "called as it is"
    if "feed_forward" in ops:
        ops, note = (), "so the feed-forward runs module by module"
    elif len(adapted) == len(rule.projections):
        ops = tuple(op for op in ops if op != "linear")
    return ops, "; ".join(part for part in (rule.note, f"{', '.join(adapted)}: LoRA, {note}") if part)


def _rows_for_the_rest(
    plan: _Plan, family: Family, roots: list[tuple[str, nn.Module]], covered: list[str]
) -> None:
    """Modules with weights that no rule speaks of: the report accounts for the whole model."""
    if not roots:
        return
    prefixes = tuple(name + "." for name in covered)
    for name, module in plan.model.named_modules():
        if (
            not name
            or name in covered
            or name.startswith(prefixes)
            or not module._parameters
            or module._modules
        ):
            continue
        if isinstance(module, nn.Embedding):
            why = "a table lookup, nothing to fuse"
        else:
            why = "outside the blocks, too small to gain"
        plan.rows.append(Row(name, type(module).__name__, report.LEFT, reason=why))


def _plan_config(plan: _Plan, family: Family, root: nn.Module) -> None:
    """Lets a model keep masks two-dimensional, if everybody on the mask's way knows what to do with one."""
    config = root.__dict__.get("config")
    cls = next(cls for cls in family.models if isinstance(root, cls))
    if not family.mask_path or config is None or config_view.is_complete(config):
        return
    if "forward" in root.__dict__:
        return
    if type(root).forward is not cls.forward or getattr(
        type(root), "_create_attention_masks", None
    ) is not getattr(cls, "_create_attention_masks", None):
        return
    known = {*family.mask_path, *(rule.patched for rule in family.rules)}
    on_path = [module for module in root.modules() if isinstance(module, family.mask_path)]
    if any(type(module) not in known or "forward" in module.__dict__ for module in on_path):
        return
    ready = {id(change.module) for change in plan.changes if change.attribute is None}
    if any(type(module) in family.reads_masks_patched and id(module) not in ready for module in on_path):
        return
    company = config_view.Company()
    for module in (root, *on_path):
        own = module.__dict__.get("config")
        if own is not None and not config_view.is_complete(own):
            seen = config_view.view(config_view.base_of(own), company, family.asks_for_full_masks, module)
            plan.changes.append(Change(module, own, seen, "config"))


def _plan_continuous_batching(plan: _Plan) -> None:
    """A door to transformers' continuous batching, which lets few implementations in, for every model that
    has our attention then.
    """
    ours = {change.module for change in plan.changes if change.attribute is None}
    for module in plan.model.modules():
        if not continuous_batching.generates(module) or continuous_batching.is_enabled(module):
            continue
        if continuous_batching.has_our_attention(module) or not ours.isdisjoint(module.modules()):
            door = continuous_batching.Door(module)
            plan.changes.append(Change(module, None, door, continuous_batching.ATTRIBUTE))


# ------------------------------------------------------------------------------------------------------------
# backends and memory


def _backends(ops: tuple[str, ...], module: nn.Module) -> tuple[tuple[str, ...], str | None]:
    """The backend that will run each operator for weights like these, or the reason why none will."""
    weight = next(module.parameters(), None)
    if weight is None:
        return (), None
    heads = getattr(module, "attention_head_size", None) or getattr(module, "head_dim", None) or 64
    chosen = []
    for op in ops:
        try:
            args, kwargs = example(op, weight.dtype, weight.device, heads)
            answer = backends.explain(op, *args, **kwargs)
        except backends.BackendError as error:
            return (), str(error)
        if answer.chosen is None:
            return (), answer.error or "no backend runs it"
        chosen.append(answer.chosen)
    return tuple(chosen), None


def _packed_bytes(targets: list[nn.Module]) -> tuple[int, int]:
    """Bytes of packed copies now, and once everything has run. Only the CPU library packs."""
    from bigmodel_kernels.ops.linear.native import packed_bytes

    projections = {
        id(weight): weight
        for target in targets
        if not _is_embedding(target)
        for weight in target.parameters()
        if weight.dim() == 2
    }
    weights = list(projections.values())
    most = sum(w.numel() * w.element_size() for w in weights if _packs(w))
    return packed_bytes(weights), most


def _is_embedding(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Embedding) for child in module.modules())


def _packs(weight: torch.Tensor) -> bool:
    return _backends(("linear",), _Holder(weight))[0] == ("native",)


class _Holder(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = (
            weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        )
