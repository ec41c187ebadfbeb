"Every architecture of timm, on the meta device: rules 1 and 3 of layer groups, and the rule that found them. Nothing is sampled, nothing skipped"
from collections import Counter

import pytest,timm,torch

from fastai_discriminative.registry import *
from fastai_discriminative.groups import *
from fastai_discriminative.groups import _classifier_names

architectures = timm.list_models()
found = {}

# Why an architecture breaks an expectation below. A line that is no longer needed fails `test_exceptions_are_needed`.
exceptions = {}

def _faults(model, groups):
    "What is wrong with `groups` by rules 1 and 3"
    names = [n for n,_ in model.named_parameters()]
    head = {n for n in names if n.startswith(_classifier_names(model))} if _classifier_names(model) else set()
    if sorted(n for g in groups for n in g.param_names)!=sorted(names): yield 'not a partition'
    if not all(g.param_names and g.n_params for g in groups): yield 'an empty group'
    if groups.depths!=sorted(set(groups.depths)): yield 'depths do not increase'
    if bool(head)!=bool(getattr(model, 'num_classes', 0)): yield f"{model.num_classes} classes, but the classifier's parameters are {sorted(head)}"
    if [g.is_head for g in groups]!=[False]*(len(groups)-bool(head))+[True]*bool(head): yield 'the head is not alone at the end'
    if head and set(groups[-1].param_names)!=head: yield 'the last group is not the classifier'

def _all_faults(arch):
    with torch.device('meta'): model = timm.create_model(arch)
    groups,blocks = layer_groups(model),layer_groups(model, 'block')
    yield from (f'{what}: {o}' for what,gs in (('default',groups), ('block',blocks)) for o in _faults(model, gs))
    if not 3<=len(groups)<=10: yield f'{len(groups)} groups by default'
    if max(len(g.layers) for g in groups)>0.4*groups.n_layers+1: yield 'a group of more than two fifths of the layers'
    if (groups.rule=='registered')!=find_family(arch).registered: yield f'found by rule {groups.rule!r}, family {groups.family!r}'
    found[arch] = groups.rule

@pytest.mark.parametrize('arch', architectures)
def test_partition_and_head(arch):
    faults = list(_all_faults(arch))
    assert bool(faults)==(arch in exceptions), faults or f'{arch} is in the table of exceptions, but needs it no longer'

def test_exceptions_name_architectures():
    assert set(exceptions)<=set(architectures) or timm.__version__!='1.0.31' # older releases have fewer

def test_nothing_was_left_out(request, capsys):
    asked = {o.callspec.params['arch'] for o in request.session.items if o.originalname=='test_partition_and_head'}
    if asked!=set(architectures): pytest.skip('a part of the zoo was chosen on the command line')
    with capsys.disabled(): print(f"\n{len(found)} architectures in groups: {', '.join(f'{n} {r}' for r,n in Counter(found.values()).most_common())}; {len(exceptions)} exceptions")
    assert set(found)==set(architectures)
