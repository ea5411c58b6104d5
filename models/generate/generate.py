#!/usr/bin/env python3
"""Writes models/data: what transformers does with each parameter of every model class that it knows.

Each class is built on the meta device from its default config (or from one of configs.py, where the default does
not build), as from_pretrained builds it before a quantizer sees it, and once more for each setting of the config
that adds or drops parameters. What is recorded is read off the built model, never off its name:

    python generate.py ../data [CLASS ...]             all classes, or the named ones (0/2 and 1/2: a half each)
    python generate.py --order ../data [CLASS ...]     the order of parameters alone, into files that are there
    python generate.py --types ../data ../types.json   afterwards: the class of a config.json that names none
    python generate.py --stacks ../data ../stacks.json afterwards: the stacks of experts of all classes
"""

import collections, contextlib, copy, importlib, inspect, itertools, json, os, re, sys, time, warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key, revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

import configs

transformers.utils.import_utils.BACKENDS_MAPPING["natten"] = (lambda: True, "")  # Dinat calls it in a forward pass only
re._MAXCACHE = 1 << 20  # patterns are matched by the thousand, over and over
for name in dir(nn.init):  # nothing is initialised on the meta device
    if name.endswith("_") and not name.startswith("_"):
        setattr(nn.init, name, lambda tensor, *a, **k: tensor)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---------------------------------------------------------------- the classes


def classes():
    """Every concrete model class that transformers exports or lists in an auto-mapping, by name."""
    root, failed = os.path.join(os.path.dirname(transformers.__file__), "models"), {}
    for folder in sorted(os.listdir(root)):
        if not os.path.isdir(os.path.join(root, folder)):
            continue
        for file in sorted(os.listdir(os.path.join(root, folder))):
            if file.startswith("modeling_") and file.endswith(".py"):
                try:
                    importlib.import_module(f"transformers.models.{folder}.{file[:-3]}")
                except Exception as e:
                    failed[f"{folder}/{file}"] = f"{type(e).__name__}: {e}"
    listed = set()
    for name, mapping in vars(transformers.models.auto.modeling_auto).items():
        if name.endswith("_MAPPING_NAMES"):
            for v in mapping.values():
                listed |= {v} if isinstance(v, str) else set(v)
    # its visual backbone comes from detectron2, is convolutions throughout, and has no linear
    transformers.utils.import_utils.BACKENDS_MAPPING["detectron2"] = (lambda: True, "")
    transformers.models.layoutlmv2.modeling_layoutlmv2.LayoutLMv2VisualBackbone = lambda config: nn.Module()
    found, todo = {}, [PreTrainedModel]
    while todo:
        for c in todo.pop().__subclasses__():
            todo.append(c)
            if c.config_class is not None and not c.__name__.endswith("PreTrainedModel"):
                if hasattr(transformers, c.__name__) or c.__name__ in listed:
                    found[c.__name__] = c
    return found, failed


def build(cls, config):
    """The model as a quantizer sees it in from_pretrained: on the meta device, ties not made yet."""
    with contextlib.ExitStack() as stack:
        for c in cls.get_init_context(torch.float32, True, False, None):
            stack.enter_context(c)
        return cls(copy.deepcopy(config))


# ------------------------------------------------------- one built model, read


def kind(model_modules, name, value):
    module_name, _, leaf = name.rpartition(".")
    module = model_modules[module_name]
    words = type(module).__name__
    if leaf == "weight":
        if type(module) is nn.Linear:
            return "linear"
        if isinstance(module, Conv1D):
            return "conv1d"
        if isinstance(module, nn.Embedding):
            return "embedding"
    if value.ndim == 3 and re.search("expert|moe", module_name + words, re.I) and not re.search("conv", words, re.I) and "bias" not in leaf:
        return "expert"
    if value.ndim == 2 and "bias" not in leaf and (re.search("Router|Gate$|TopK", words) or re.search(r"(^|[._])(router|gate)$", module_name)):
        return "router"
    return "other"


def raw_weights(model):
    """Linears whose weight goes raw into a fused kernel (the Mamba-2 mixers' out_proj): packed, it would be garbage there."""
    found = set()
    for name, module in model.named_modules():
        if "out_proj" in dict(module.named_children()) and type(module).__module__.startswith("transformers"):
            if re.search(r"outproj_weight\s*=\s*self\.out_proj\.weight", inspect.getsource(type(module))):
                found.add(f"{name}.out_proj" if name else "out_proj")
    return found


def matches(name, keys):
    return not should_convert_module(name, list(keys))


Own = collections.namedtuple("Own", "parameters is_transposed inputs_first interleaved")


def own_parameters(model):
    """{module: Own} of those that have several matrices or stacks of them as parameters of their own, in the order in which they were
    registered. PEFT nests the wrappers of target_parameters in this order, and tells the sides of a stack by is_transposed. inputs_first
    is whether the stacks of gate_up_proj and down_proj lie (experts, in, out), interleaved whether gate and up take turns in the first."""
    out = {}
    for name, module in model.named_modules():
        shapes = {n: v.shape for n, v in module.named_parameters(recurse=False) if v.ndim in (2, 3)}
        if not name or len(shapes) < 2 or isinstance(module, (nn.ParameterList, nn.ParameterDict, nn.utils.parametrize.ParametrizationList)):
            continue  # PEFT cannot wrap the model itself, and what is in a list or a parametrisation is read past any wrapper
        up, down = shapes.get("gate_up_proj", ()), shapes.get("down_proj", ())
        transposed, first = bool(getattr(module, "is_transposed", False)), False
        if len(up) == len(down) == 3:
            ways = [up[1] == 2 * down[2] and up[2] == down[1], up[2] == 2 * down[1] and up[1] == down[2]]
            if ways[0] == ways[1]:
                raise RuntimeError(f"{name}: gate_up_proj {up} and down_proj {down} do not tell which side is the inputs'")
            first = ways[1]
        elif transposed:
            raise RuntimeError(f"{name}: is_transposed, and none of gate_up_proj and down_proj")
        out[name] = Own(tuple(shapes), transposed, first, not getattr(module, "is_concatenated", True))
    return out


def merged(a, b):
    """One order of the names of two that agree on what both have, or None."""
    both = [n for n in a if n in b]
    if both != [n for n in b if n in a]:
        return None
    out, rest = [], list(b)
    for n in a:
        if n in b:
            out += rest[: rest.index(n)]
            rest = rest[rest.index(n) + 1 :]
        out.append(n)
    return tuple(out + rest)


def read(model):
    """What one built model says, by run-time parameter name."""
    modules = dict(model.named_modules())
    state = model.state_dict()
    named = [n for n, _ in model.named_parameters()]
    fp32, strict = model._keep_in_fp32_modules or set(), model._keep_in_fp32_modules_strict or set()
    plan = lambda keys: (lambda n: False) if not keys else (lambda p: lambda n: bool(p.search(n)))(build_glob_alternation(list(keys))[0])
    in_fp32, in_strict = plan(fp32), plan(strict)
    skip = set(get_keys_to_not_convert(model)) | set(fp32)
    last = named[-1].removesuffix(".weight") if named else ""
    raw = raw_weights(model)
    ties = dict(model.all_tied_weights_keys)
    tied = {k.removesuffix(".weight") for k in [*ties, *ties.values()]}
    head = model.get_output_embeddings()
    heads = [n for n, m in modules.items() if head is not None and m is head]
    try:
        table = model.get_input_embeddings()
    except Exception:
        table = None
    always = set(heads) | set(fp32)  # without the ties and without the last parameter
    out = {}
    for n, v in state.items():
        k = kind(modules, n, v)
        m = n.rpartition(".")[0]
        flags = set()
        if k in ("linear", "conv1d"):
            if matches(m, skip):
                flags.add("skip")
            if matches(m, always):
                flags.add("stays")
            if m in raw:
                flags.add("raw")
        if in_strict(n):
            flags.add("strict")
        elif in_fp32(n):
            flags.add("fp32")
        out[n] = (k, v.ndim, frozenset(flags))
    return {
        "parameters": out,
        "order": named,
        "last": last,
        "heads": heads,
        "embeddings": [n for n, m in modules.items() if table is not None and m is table],
        "ties": ties,
        "tied": tied,
        "skip": skip,
    }


# ---------------------------------------------------- names in the file, slices

Slice = collections.namedtuple("Slice", "param expert transposed dim part parts file_dim file_part file_parts via", defaults=(None, False, 0, 0, 1, 0, 0, 1, ""))


def numbers(name):
    return [int(p) for p in name.split(".") if p.isdigit()]


def slices(converter, source, renamed, shapes):
    """The run-time parameters that one tensor of the file becomes, by the operations of its converter."""
    ops = converter.operations
    names = [type(o).__name__ for o in ops]
    targets = converter.target_patterns
    if len(targets) > 1 and targets[0] not in renamed:
        return [Slice(renamed, via="+".join(names))]
    params = [renamed.replace(targets[0], t) for t in targets]
    part, parts = converter.source_patterns.index(source), len(converter.source_patterns)
    if names == ["MergeModulelist"] and parts == 1 and ops[0].dim == 0:
        return [Slice(renamed, expert=True)]
    if names == ["MergeModulelist", "Concatenate"] and ops[0].dim == 0 and ops[1].dim == 1:
        return [Slice(renamed, expert=True, dim=0, part=part, parts=parts)]
    if names == ["Concatenate"] and parts > 1:
        return [Slice(renamed, dim=ops[0].dim, part=part, parts=parts)]
    if names == ["Chunk"] and ops[0].num_shards_attribute is None:
        return [Slice(p, file_dim=ops[0].dim, file_part=i, file_parts=len(params)) for i, p in enumerate(params)]
    if names == ["Transpose"] and not ops[0].check_dims:
        return [Slice(renamed, transposed=True)]
    return [Slice(p, expert="*" in source, via="+".join(names)) for p in params]


def files(model, state, older=False):
    """{name in the file: [Slice, ...]} as transformers saves the model and loads it back; with older, under the names of older
    releases that have a prefix more or less (vision_tower.vision_model), which it saves only if it has read them."""
    transforms = get_model_conversion_mapping(model, add_legacy=True)
    if older:
        if not any(isinstance(t, PrefixChange) for t in transforms):
            return {}, []
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    try:
        saved = list(revert_weight_conversion(model, dict(state)))
    except Exception as e:
        raise RuntimeError(f"names: {type(e).__name__}: {e}")
    finally:
        if older:
            del model._weight_conversions
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_source = {s: c for c in converters for s in c.source_patterns}
    out, bad = {}, []
    for f in saved:
        renamed, source = rename_source_key(f, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and f in state:
            renamed, source = rename_source_key(f, [], [], model.base_model_prefix, state)
        if renamed not in state:
            bad.append(f)
            continue
        out[f] = [Slice(renamed)] if source is None else slices(by_source[source], source, renamed, state)
        # a module list of one expert and the like: the names must differ for the rule to be more than a copy
        if [s.param for s in out[f]] == [f] and not out[f][0].expert and not out[f][0].transposed and not out[f][0].via:
            out[f] = [Slice(f)]
    return out, bad


# --------------------------------------------------------------------- patterns


def abstract(name):
    return ".".join("#" if p.isdigit() else p for p in name.split("."))


def places(name):
    return [i for i, p in enumerate(name.split(".")) if p.isdigit()]


def generalise(entries):
    """{name: value} -> {pattern: value}: every number is a # where all names of that shape have one value; else the numbers that
    decide are kept, the last ones first (an index into a Sequential decides, a layer's hardly ever)."""
    groups = collections.defaultdict(dict)
    for n, v in entries.items():
        groups[abstract(n)][n] = v
    out = {}
    for pattern, group in groups.items():
        if len(set(group.values())) == 1:
            out[pattern] = next(iter(group.values()))
            continue
        at = places(next(iter(group)))
        subsets = sorted(range(1, 1 << len(at)), key=lambda b: (bin(b).count("1"), -b))
        for bits in subsets:
            keep = {p for i, p in enumerate(at) if bits >> i & 1}
            trial = collections.defaultdict(set)
            for n, v in group.items():
                trial[".".join("#" if p.isdigit() and i not in keep else p for i, p in enumerate(n.split(".")))].add(v)
            if all(len(v) == 1 for v in trial.values()):
                # the commonest value of what is left may serve the numbers that no name here has
                out.update({k: next(iter(v)) for k, v in trial.items()})
                break
        else:
            out.update(group)
    return out


def templates(entries):
    """{name in the file: [Slice, ...]} with the numbers of the run-time names as # (the file's next number, or that and a constant: #+1)
    or as they are. The file's number of the expert is left out: its place becomes the Slice's expert. Names for which no such rule
    holds are returned apart, as they are."""
    groups = collections.defaultdict(list)
    for f, found in entries.items():
        groups[abstract(f), tuple(s._replace(param=abstract(s.param)) for s in found)].append(f)
    ruled, literal = {}, {}
    for (_, kinds), names in groups.items():
        rules = [rule([(numbers(f), numbers(entries[f][i].param)) for f in names], s.expert) for i, s in enumerate(kinds)]
        for f in names:
            out = []
            for s, r in zip(entries[f], rules):
                if r is None:
                    out.append(s._replace(expert=None))
                    continue
                expert, at = r
                it = iter(at)
                parts = [p if not p.isdigit() else (lambda d: p if d is None else "#" + (f"{d:+d}" if d else ""))(next(it)) for p in s.param.split(".")]
                out.append(s._replace(param=".".join(parts), expert=expert))
            (literal if None in rules else ruled)[f] = tuple(out)
    return ruled, literal


def rule(pairs, expert):
    """Which numbers of the run-time names are the file's, and how far off: (the expert's place, [difference or None for a constant])."""
    have, want = len(pairs[0][0]), len(pairs[0][1])
    places = range(have) if expert else [None]
    for e in reversed(places):
        rest = [[n for i, n in enumerate(f) if i != e] for f, _ in pairs]
        for at in itertools.combinations(range(want), len(rest[0])):
            steps = [{r[i] - f[j] for f, (_, r) in zip(rest, pairs)} for j, i in enumerate(at)]
            fixed = all(len({r[i] for _, r in pairs}) == 1 for i in range(want) if i not in at)
            if fixed and all(len(s) == 1 for s in steps) and (expert is None or not expert or all(s == {0} for s in steps)):
                of = dict(zip(at, (s.pop() for s in steps)))
                return e, [of.get(i) for i in range(want)]
    return None


def braces(patterns, width=150):
    """Patterns with their common parts written once, as a shell expands them: a.{b,c}.weight; a long line is split at its first brace."""
    tree = {}
    for p in patterns:
        node = tree
        for part in p.split("."):
            node = node.setdefault(part, {})
        node[""] = {}

    def join(names):
        return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"

    def tails(node):
        groups = collections.OrderedDict()
        for part, child in node.items():
            groups.setdefault("" if part == "" else tail(child), []).append(part)
        return [n if t == "" else f"{n}.{t}" for t, names in groups.items() for n in [join(names)]]

    def tail(node):
        return "" if list(node) == [""] else join(tails(node))

    def lines(prefix, node):
        for part, child in node.items():
            if part == "":
                yield prefix
                continue
            here = f"{prefix}.{part}" if prefix else part
            t = tail(child)
            line = f"{here}.{t}" if t else here
            if len(line) <= width or not t:
                yield line
            else:
                yield from lines(here, child)

    return list(lines("", tree))


def expanded(line):
    """The patterns of a line that braces wrote."""
    at = line.find("{")
    if at < 0:
        return [line]
    depth, start, choices = 0, at + 1, []
    for i in range(at, len(line)):
        depth += (line[i] == "{") - (line[i] == "}")
        if depth == 1 and line[i] == "," or depth == 0:
            choices.append(line[start:i])
            start = i + 1
        if depth == 0:
            return [x for c in choices for x in expanded(line[:at] + c + line[i + 1 :])]


def generalisations(name, patterns):
    """Those of the patterns that mean a name, in which any of its numbers may be a #."""
    parts = name.split(".")
    at = [i for i, p in enumerate(parts) if p.isdigit()]
    if len(at) > 6:
        at = at[-6:]
    for bits in range(1 << len(at)):
        p = list(parts)
        for k, i in enumerate(at):
            if bits >> k & 1:
                p[i] = "#"
        if ".".join(p) in patterns:
            yield ".".join(p)


# ------------------------------------------------------------------- the config


def plain(config):
    """The config as a config.json has it, or None where it does not survive the way there and back."""
    try:
        d = json.loads(config.to_json_string(use_diff=False))
        type(config).from_dict(copy.deepcopy(d))
        return d
    except Exception:
        return None


def at(d, path):
    for p in path:
        d = d[p]
    return d


def sections(config, path=()):
    """The paths of a config's own sections: () and those of its sub-configs."""
    yield path
    for name in getattr(type(config), "sub_configs", None) or {}:
        sub = getattr(config, name, None)
        if isinstance(sub, transformers.PretrainedConfig):
            yield from sections(sub, path + (name,))


def changed(cls, base, edits):
    """The config with the members at `edits` ({(path..., name): value or None to remove}) changed."""
    if isinstance(base, dict):
        d = copy.deepcopy(base)
        for (*path, name), v in edits.items():
            if v is REMOVED:
                at(d, path).pop(name, None)
            else:
                at(d, path)[name] = v
        return cls.config_class.from_dict(d)
    c = copy.deepcopy(base)
    for (*path, name), v in edits.items():
        sub = c
        for p in path:
            sub = getattr(sub, p)
        if v is not REMOVED:
            setattr(sub, name, v)
    return c


REMOVED = object()
LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|num_(encoder|decoder|hidden|text|audio|vision)_layers|(encoder|decoder|text|speech_encoder)_layers|(encoder|decoder|speech_encoder)_num_layers|depth|num_blocks)$")
EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|n_experts|num_expert|zero_expert_num)$")
FEW = 8
PICKED = re.compile(r"(per_tok|top_?k|topk|n_group|topk_group|num_selected|moe_k)")


def small(cls, d):
    """The config with at most eight layers and experts, or d itself where that does not build. Lists of one item a layer are cut."""

    def cut(d):
        lengths = {v for k, v in d.items() if LAYERS.search(k) and isinstance(v, int) and v > FEW}
        out = {}
        for k, v in d.items():
            if isinstance(v, dict):
                v = cut(v)
            elif isinstance(v, list) and len(v) in lengths:
                v = v[:FEW]
            elif isinstance(v, int) and not isinstance(v, bool) and v > FEW and (LAYERS.search(k) or EXPERTS.search(k)):
                v = FEW
            out[k] = v
        return out

    trial = cut(d)
    try:
        build(cls, cls.config_class.from_dict(copy.deepcopy(trial)))
        return trial
    except Exception:
        return d


BORING = re.compile(r"(_token_id|_index|_token)$|^(use_cache|return_dict|output_|torchscript|is_encoder_decoder|chunk_size|gradient_checkpointing|tie_word_embeddings|problem_type|id2label|label2id|_attn|dtype|torch_dtype|transformers_version|architectures|model_type|name_or_path|pruned_heads|finetuning|task_specific|tokenizer_class|prefix|use_bfloat16|tf_legacy)")
COUNTED = re.compile(r"rank|expert|n_shared|first_k_dense|adapter|projection|num_key_value|type_vocab|frequency|freq|every|period|step|sparse|moe|stages|offset|interval")


def flips(base, paths):
    """Changes of one member that may add or drop parameters."""
    for path in paths:
        section = at(base, path)
        for name, v in sorted(section.items()):
            if BORING.search(name) or isinstance(v, dict) or isinstance(v, list) and v and name not in configs.CHOICES:
                continue
            if name in configs.CHOICES:
                values = [x for x in configs.CHOICES[name] if x != v]
            elif isinstance(v, bool):
                values = [not v]
            elif v is None:
                values = [True, 8, [0]]
            elif v == []:
                values = [[0]]
            elif isinstance(v, int) and COUNTED.search(name):
                values = [x for x in (None, 0, 1, 2) if x != v]
            else:
                continue
            for x in values:
                yield path + (name,), x
    for members in configs.TOGETHER:
        for path in paths:
            if list(members)[-1] in at(base, path):
                yield tuple((path + (name,), x) for name, x in members.items()), None


# ----------------------------------------------------------------- one class

PATIENCE = float(os.environ.get("PATIENCE", 40))  # seconds of flips a class
EFFECTIVE = {}  # config class -> the flips that changed something for a class already done


def tie_groups(model):
    """{name of the submodel: its ties}, for the submodels whose ties their config can switch on."""
    out = {}
    for prefix, m in model.named_modules():
        if isinstance(m, PreTrainedModel) and m._tied_weights_keys:
            c, had = m.config, getattr(m.config, "tie_word_embeddings", None)
            try:
                m.config = copy.deepcopy(c)
                m.config.tie_word_embeddings = True
                pairs = m.get_expanded_tied_weights_keys(all_submodels=False)
            except Exception:
                continue
            finally:
                m.config = c
            dot = prefix + "." if prefix else ""
            if pairs:
                out[prefix] = {dot + k: dot + v for k, v in pairs.items()}
    return out


class Class:
    def __init__(self, cls, log):
        self.cls, self.name, self.log = cls, cls.__name__, log
        self.parameters, self.files, self.older, self.bad = {}, {}, {}, set()
        self.own = {}  # pattern of a module -> Own
        self.lasts = []  # (what was changed, module, the linears that it keeps from being quantised)
        self.models = 0

    def add(self, model, why):
        """Merges one built model; reports whether it brought anything new."""
        r = read(model)
        self.models += 1
        self.add_own(model, why)
        new = False
        for n, (k, ndim, flags) in r["parameters"].items():
            v = (k, ndim, flags - {"skip"})
            old = self.parameters.setdefault(n, v)
            if old is v:
                new = True
            elif old != v and old[1] == ndim:
                self.log(f"{self.name}: {n} is {old} by default and {v} with {why}")
        linear = {n.rpartition(".")[0]: f for n, (k, _, f) in r["parameters"].items() if k in ("linear", "conv1d")}
        hit = sorted(m for m, f in linear.items() if matches(m, [r["last"]]) and "stays" not in f)
        self.lasts.append((why, r["last"] if hit else "", hit))
        for m, f in linear.items():
            want = "skip" in f
            guess = "stays" in f or matches(m, r["tied"]) or matches(m, [r["last"]])
            if want != guess:
                self.log(f"{self.name}: {m}: skipped {want}, the rule says {guess} with {why}")
        return new, r

    def add_own(self, model, why):
        """Merges the orders of one built model."""
        for n, own in own_parameters(model).items():
            old = self.own.setdefault(abstract(n), own)
            names = merged(old.parameters, own.parameters)
            if names is None or old[1:] != own[1:]:
                raise RuntimeError(f"{n} has the parameters {own} with {why}, and elsewhere {old}")
            self.own[abstract(n)] = own._replace(parameters=names)

    def name_files(self, model, why):
        found, bad = files(model, model.state_dict())
        self.bad.update(bad)
        for f, s in found.items():
            old = self.files.setdefault(f, s)
            if old != s:
                self.log(f"{self.name}: the file's {f} is {old} by default and {s} with {why}")
        for f, s in files(model, model.state_dict(), older=True)[0].items():
            if f not in self.files:
                self.older.setdefault(f, s)

    def ties(self, base, paths):
        """[{config: the members that decide, the first present wins, or any that is true; default; pairs}]"""
        cls = self.cls
        named = lambda p: sorted(k for k, v in at(base, p).items() if k.startswith("tie_") and isinstance(v, bool)) if isinstance(base, dict) else []
        members = [p + (k,) for p in paths for k in sorted({"tie_word_embeddings", *named(p)})]
        bare = {m: REMOVED for m in members}

        def made(edits):
            try:
                m = build(cls, changed(cls, base, {**bare, **edits}))
            except Exception:
                return None, None
            return m, dict(m.all_tied_weights_keys)

        model, have = made({})
        if model is None:
            return []
        groups = tie_groups(model)
        if not groups:
            return [{"config": [], "default": True, "pairs": have}] if have else []
        on = lambda have, g: have is not None and all(have.get(k) == v for k, v in groups[g].items())
        default = {g: on(have, g) for g in groups}
        result = {g: {} for g in groups}
        for m in members:
            found = [made({m: b})[1] for b in (True, False)]
            if None not in found:
                for g in groups:
                    result[g][m] = tuple(on(h, g) for h in found)
        out = []
        for g, pairs in groups.items():
            deciding = [m for m, r in result[g].items() if r != (default[g], default[g])]
            if not deciding and not default[g]:
                continue
            either = False
            for m in deciding:
                if result[g][m] != (True, False):
                    self.log(f"{self.name}: tie of {g!r}: {m} set to true, false gives {result[g][m]}, default {default[g]}")
            if len(deciding) == 2:
                a, b = deciding
                x, y = on(made({a: True, b: False})[1], g), on(made({a: False, b: True})[1], g)
                deciding = [a, b] if x else [b, a]
                either = x and y
                if not x and not y:
                    self.log(f"{self.name}: tie of {g!r}: both {a} and {b} must be true")
            elif len(deciding) > 2:
                self.log(f"{self.name}: tie of {g!r}: more than two members decide: {deciding}")
            out.append({"config": [".".join(m) for m in deciding], **({"either": True} if either else {}), "default": default[g], "pairs": pairs})
        return out

    def run(self):
        cls = self.cls
        make = configs.BY_CLASS.get(self.name) or configs.BY_CONFIG.get(cls.config_class.__name__) or cls.config_class
        config = make()
        model = build(cls, config)
        self.base_prefix = model.base_model_prefix or ""
        self.model_type = getattr(config, "model_type", "") or ""
        _, r = self.add(model, "the default config")
        self.last = r["order"][-1] if r["order"] else ""
        self.heads, self.embeddings = r["heads"], r["embeddings"]
        dictionary = plain(config)
        full = dictionary
        if dictionary is not None:
            dictionary = small(cls, dictionary)
        if dictionary != full:
            model = build(cls, changed(cls, dictionary, {}))
            self.add(model, "few layers")
            self.lasts = self.lasts[:1]
        self.name_files(model, "the default config")
        base = dictionary if dictionary is not None else config
        paths = list(sections(config))
        if dictionary is not None:
            paths = [p for p in paths if self.reachable(dictionary, p)]
        self.tied = self.ties(base, paths)
        self.counts = []
        if dictionary is not None:
            known = EFFECTIVE.setdefault(cls.config_class, [[], 0])
            todo = known[0] if known[1] >= 2 else list(flips(dictionary, paths))
            known[1] += 1
            start = time.time()
            for key, value in todo:
                if time.time() - start > PATIENCE:
                    self.log(f"{self.name}: out of time at {key}")
                    break
                edits = dict(key) if isinstance(key[0], tuple) else {key: value}
                try:
                    m = build(cls, changed(cls, dictionary, edits))
                except Exception:
                    continue
                why = ", ".join(f"{'.'.join(k)}={v}" for k, v in edits.items())
                last = self.lasts[0]
                named = [n for n, _ in m.named_parameters()]
                if self.parameters.keys() >= m.state_dict().keys() and abstract(named[-1]) == abstract(self.last):
                    continue
                try:
                    new, _ = self.add(m, why)
                    self.lasts[-1] = ([(".".join(k), v) for k, v in edits.items()], *self.lasts[-1][1:])
                    if new:
                        self.name_files(m, why)
                except Exception as e:
                    self.log(f"{self.name}: {why}: {type(e).__name__}: {e}")
                    continue
                if (new or self.lasts[-1][1:] != last[1:]) and (key, value) not in known[0]:
                    known[0].append((key, value))
            self.counts = self.last_counts(full, paths)
        return self.data()

    def reachable(self, d, path):
        try:
            return isinstance(at(d, path), dict)
        except KeyError:
            return False

    def last_counts(self, base, paths):
        """Which members of the config set the numbers in the last parameter's name."""
        last = self.lasts[0][1]
        out, want = [], numbers(last)
        for i, n in enumerate(want):
            found = None
            for path in paths:
                for name, v in sorted(at(base, path).items()):
                    if found is None and isinstance(v, int) and not isinstance(v, bool) and v == n + 1:
                        try:
                            m = build(self.cls, changed(self.cls, base, {path + (name,): v + 1}))
                        except Exception:
                            continue
                        now = list(m.named_parameters())[-1][0].removesuffix(".weight")
                        if abstract(now) == abstract(last) and numbers(now)[i] == n + 1:
                            found = ".".join(path + (name,))
            out.append(found)
        return out

    # what is written

    def data(self):
        ranks = collections.defaultdict(set)
        for n, v in self.parameters.items():
            ranks[abstract(n)].add(v[1])
        plain_, ranked = {}, collections.defaultdict(dict)
        for n, v in self.parameters.items():
            if len(ranks[abstract(n)]) == 1:
                plain_[n] = (v[0], v[2])
            else:
                ranked[v[1]][n] = (v[0], v[2])
        patterns = generalise(plain_)
        for ndim, entries in ranked.items():
            patterns.update({f"{p}[{ndim}]": v for p, v in generalise(entries).items()})
        kinds = collections.OrderedDict()
        for p, (k, flags) in patterns.items():
            words = [k]
            if "stays" in flags:
                words.append("stays")
            if "raw" in flags:
                words.append("raw")
            if "strict" in flags:
                words.append("float32 strict")
            elif "fp32" in flags:
                words.append("float32")
            kinds.setdefault(", ".join(words), []).append(p)
        out = {"class": self.name, "model_type": self.model_type, "base": self.base_prefix}
        if self.heads:
            out["head"] = self.heads[0]
        if self.embeddings:
            out["embedding"] = self.embeddings[0]
        ties = []
        for t in self.tied:
            by = collections.defaultdict(list)
            for k, v in t["pairs"].items():
                by[abstract(k)].append((k, v))
            pairs = set()
            for pattern, found in by.items():
                if all(numbers(k) == numbers(v) != [] for k, v in found):  # each layer's with the same layer's
                    pairs.add((pattern, abstract(found[0][1])))
                elif len({v for _, v in found}) == 1 and (len(found) > 1 or abstract(found[0][1]) == pattern):  # all layers' with one
                    pairs.add((pattern, found[0][1]))
                else:
                    pairs.update(found)
            ties.append({**t, "pairs": dict(sorted(pairs))})
        if ties:
            out["ties"] = ties
        lasts = {}
        for why, last, hit in self.lasts:
            if last != self.lasts[0][1]:
                lasts.setdefault(last, []).append(why)
        if self.lasts[0][1]:
            out["last"] = {"module": self.lasts[0][1], "counts": self.counts}
        if lasts:
            out["last_else"] = [{"config": p, "is": v, "module": k} for k, whys in lasts.items() for why in whys for p, v in why[:1]]
        out["parameters"] = {k: braces(v) for k, v in kinds.items()}
        if self.own:
            out["order"] = self.order()
        self.names(out)
        if self.bad:
            self.log(f"{self.name}: {len(self.bad)} names of the file are not read back: {sorted(self.bad)[:3]}")
        return out

    def order(self):
        groups = collections.OrderedDict()
        for pattern, own in self.own.items():
            groups.setdefault(own, []).append(pattern)
        flags = lambda own: {f: True for f in Own._fields[1:] if getattr(own, f)}
        return [{"modules": braces(patterns), "parameters": list(own.parameters), **flags(own)} for own, patterns in groups.items()]

    def run_order(self, d):
        """Builds what has all parameters of the class's data d, and returns d with their order."""
        cls = self.cls
        make = configs.BY_CLASS.get(self.name) or configs.BY_CONFIG.get(cls.config_class.__name__) or cls.config_class
        config, seen = make(), set()
        missing = {p.partition("[")[0] for lines in d["parameters"].values() for line in lines for p in expanded(line)}

        def take(c, why):
            model = build(cls, c)
            self.add_own(model, why)
            for n in model.state_dict():
                missing.difference_update(generalisations(n, missing))

        take(config, "the default config")
        dictionary = plain(config)
        if dictionary is not None:
            dictionary = small(cls, dictionary)
            take(changed(cls, dictionary, {}), "few layers")
            # a bias beside a weight is no matrix, and where a parameter stands alone there is no order
            alone = lambda n: n.rpartition(".")[2] == "bias" or n.rpartition(".")[2] == "weight"
            start = time.time()
            for key, value in flips(dictionary, [p for p in sections(config) if self.reachable(dictionary, p)]):
                if not [n for n in missing if not alone(n)] or time.time() - start > PATIENCE:
                    break
                edits = dict(key) if isinstance(key[0], tuple) else {key: value}
                try:
                    c = changed(cls, dictionary, edits)
                    build(cls, c)
                except Exception:
                    continue
                take(c, ", ".join(f"{'.'.join(k)}={v}" for k, v in edits.items()))
            left = sorted(n for n in missing if not alone(n))
            if left:
                self.log(f"{self.name}: no config was found that has {left[:5]}")
        out = {}
        for k, v in d.items():
            if k != "order":
                out[k] = v
            if k == "parameters" and self.own:
                out["order"] = self.order()
        return out

    def names(self, out):
        for member, names in ("renamed", self.files), ("older", self.older):
            ruled, literal = templates(names)
            found = {**generalise(ruled), **literal}
            plain_, rest = {}, {}
            for f, t in found.items():
                if len(t) == 1 and t[0] == Slice(t[0].param):
                    plain_[f] = t[0].param
                else:
                    rest[f] = t
            rules = prefixes(plain_)
            if rules:
                out[member] = rules
            if rest:
                out.setdefault("slices", []).extend(one(f, s) for f, t in sorted(rest.items()) for s in t)


def one(file, s):
    d = {"file": file, "param": s.param}
    if s.expert is not None:
        d["expert"] = s.expert
    if s.transposed:
        d["transposed"] = True
    if s.parts > 1:
        d["part"] = [s.part, s.parts, s.dim]
    if s.file_parts > 1:
        d["of"] = [s.file_part, s.file_parts, s.file_dim]
    if s.via:
        d["via"] = s.via
    return d


def prefixes(pairs):
    """{file's name: run-time name} -> {file's prefix: run-time prefix}: the shortest prefixes below which all names agree."""
    out = {}

    def stem(f, p, a):  # the run-time name of the prefix a, as f and p have it
        rest = f[len(a) + 1 :] if a else f
        if f == a:
            return p
        return p[: -len(rest) - 1] if p.endswith("." + rest) else "" if p == rest else None

    def go(a, names, inherited):
        stems = {stem(f, pairs[f], a) for f in names}
        if len(stems) == 1 and None not in stems:
            b = stems.pop()
            if b != inherited:
                out[a] = b
            return
        below = collections.defaultdict(list)
        for f in names:
            if f != a:
                below[(a + "." if a else "") + f[len(a) + 1 if a else 0 :].split(".")[0]].append(f)
        if a in names and pairs[a] != inherited:
            out[a] = pairs[a]
        for c, fs in below.items():
            last = c.split(".")[-1]
            go(c, fs, (inherited + "." if inherited else "") + last if inherited is not None else None)

    go("", list(pairs), "")
    return dict(sorted(out.items()))


def write(folder, d):
    with open(os.path.join(folder, d["class"] + ".json"), "w") as f:
        f.write(text(d))


def text(d):
    """JSON with one line a pattern."""
    lines = ["{"]
    items = list(d.items())
    for i, (k, v) in enumerate(items):
        comma = "," if i + 1 < len(items) else ""
        if k == "parameters":
            lines.append(f' "{k}": {{')
            groups = list(v.items())
            for j, (g, ps) in enumerate(groups):
                lines.append(f"  {json.dumps(g)}: [")
                lines.extend(f"   {json.dumps(p)}{',' if q + 1 < len(ps) else ''}" for q, p in enumerate(ps))
                lines.append("  ]" + ("," if j + 1 < len(groups) else ""))
            lines.append(" }" + comma)
        elif k in ("slices", "ties", "order") and v:
            lines.append(f' "{k}": [')
            lines.extend(f"  {json.dumps(x)}{',' if q + 1 < len(v) else ''}" for q, x in enumerate(v))
            lines.append(" ]" + comma)
        elif k in ("renamed", "older"):
            lines.append(f' "{k}": {{')
            lines.extend(f"  {json.dumps(a)}: {json.dumps(b)}{',' if q + 1 < len(v) else ''}" for q, (a, b) in enumerate(v.items()))
            lines.append(" }" + comma)
        else:
            lines.append(f" {json.dumps(k)}: {json.dumps(v)}{comma}")
    lines.append("}")
    return "\n".join(lines) + "\n"


def types(folder):
    """{model type: the class that a config.json without "architectures" most likely means}, of those that have data: the one that
    generates text, but the base model for a type that fills in masks."""
    auto = transformers.models.auto.modeling_auto
    known = {f.removesuffix(".json") for f in os.listdir(folder)}
    order = ["SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM"]
    out = {}
    for kind in sorted(auto.MODEL_MAPPING_NAMES.keys() | auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()):
        masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        for name in ([o for o in order if o != "CAUSAL_LM"] if masked else order) + ["", "CAUSAL_LM"]:
            c = getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES" if name else "MODEL_MAPPING_NAMES").get(kind, ())
            for c in [c] if isinstance(c, str) else c:
                if c in known:
                    out.setdefault(kind, c)
    return out


def stacks(folder):
    """What the classes agree on about modules with several stacks of experts, for an adapter whose base is not at hand: the end of the
    module's name, its parameters in their order, how they lie, and the model types that have them so."""
    out = {}
    for file in sorted(os.listdir(folder)):
        with open(os.path.join(folder, file)) as f:
            d = json.load(f)
        experts = {p for line in d["parameters"].get("expert", []) for p in expanded(line)}
        for o in d.get("order", []):
            for module in (m for line in o["modules"] for m in expanded(line)):
                if not any(f"{module}.{p}" in experts for p in o["parameters"]):
                    continue
                end = ".".join(module.split(".")[-2:])
                key = json.dumps({"module": end, **{k: v for k, v in o.items() if k != "modules"}})
                out.setdefault(key, set()).add(d["model_type"] or d["class"])
    return [{**json.loads(k), "types": sorted(v)} for k, v in sorted(out.items())]


def main():
    if sys.argv[1:2] == ["--types"]:
        with open(sys.argv[3], "w") as f:
            f.write(json.dumps(types(sys.argv[2]), indent=1) + "\n")
        return
    if sys.argv[1:2] == ["--stacks"]:
        with open(sys.argv[3], "w") as f:
            f.write("[\n" + ",\n".join(f" {json.dumps(s)}" for s in stacks(sys.argv[2])) + "\n]\n")
        return
    only_order = sys.argv[1] == "--order"
    if only_order:
        del sys.argv[1]
    found, failed = classes()
    folder, names = sys.argv[1], sys.argv[2:]
    if names and re.fullmatch(r"\d+/\d+", names[0]):  # one share of all, by model type, so that two processes halve the time
        i, n = map(int, names[0].split("/"))
        order = sorted({c.config_class.__name__ for c in found.values()})
        names = sorted(k for k, c in found.items() if order.index(c.config_class.__name__) % n == i)
    log = lambda line: print(line, file=sys.stderr, flush=True)
    for name in names or sorted(found):
        try:
            if only_order:
                with open(os.path.join(folder, name + ".json")) as f:
                    write(folder, Class(found[name], log).run_order(json.load(f)))
                continue
            write(folder, Class(found[name], log).run())
        except Exception as e:
            log(f"FAILED {name}: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
    for k, v in failed.items():
        log(f"FAILED {k}: {v}")


if __name__ == "__main__":
    main()
