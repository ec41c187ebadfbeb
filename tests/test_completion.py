"Completion in a real bash and fish, by the scripts that the command prints"
import os,pty,select,shutil,subprocess,sys,time

import pytest

from fastai_discriminative.all import * # a test may not leave behind what an import sets
from fastai_discriminative.cli import main

pytestmark = pytest.mark.xdist_group('completion')
# `.ci/run` installs shtab with the extra `dev`; the oldest versions are tested without that extra
pytest.importorskip('shtab', reason='shtab is not installed: it comes with the extras `completion` and `dev`')

@pytest.fixture(scope='module')
def script(tmp_path_factory):
    "A function that writes a shell's script, once, and says where"
    path = tmp_path_factory.mktemp('completion')
    def _f(shell, capsys):
        if not (path/shell).exists():
            assert main(['completion', shell])==0
            (path/shell).write_text(capsys.readouterr().out, encoding='utf-8')
        return path/shell
    return _f

class _Bash:
    "An interactive bash in a terminal of its own, with `script` read"
    def __init__(self, script, cwd):
        self.fd,far = pty.openpty()
        env = dict(PATH=os.environ['PATH'], TERM='dumb', HOME=str(cwd), PS1='$ ', COLUMNS='1000')
        self.proc = subprocess.Popen(['bash','--norc','--noprofile','-i'], stdin=far, stdout=far, stderr=far, cwd=cwd, env=env, start_new_session=True)
        os.close(far)
        self.say(f"stty cols 1000; bind 'set bell-style none'; source {script}; echo re''ady\n", 'ready')

    def say(self, text, until, timeout=30):
        "Type `text`, and what is on the screen when it shows `until`"
        os.write(self.fd, text.encode())
        seen,end = '',time.monotonic()+timeout
        while until not in seen and time.monotonic()<end:
            if select.select([self.fd], [], [], .1)[0]: seen += os.read(self.fd, 65536).decode(errors='replace')
        assert until in seen, seen[-500:]
        return seen

    def complete(self, line):
        "What Tab makes of `line`"
        seen = self.say(f"{line}\t\x01printf '<%s>' '\x05' ; echo do''ne\n", 'done\r\n')
        return seen.rpartition('<')[2].partition('>')[0]

    def close(self):
        self.proc.kill()
        self.proc.wait()
        os.close(self.fd)

# A script can only be tried in its own shell; `.ci/run`, itself in bash, installs the two others where it may
@pytest.mark.skipif(not shutil.which('bash'), reason='bash is not installed')
def test_bash(script, tmp_path, capsys):
    (tmp_path/'photos').mkdir()
    bash = _Bash(script('bash', capsys), tmp_path)
    try:
        for line,want in [('fi','finetune '), ('preset vit_base_patch16_224.ma','preset vit_base_patch16_224.mae '), ('groups convnext_tiny.fb_in22k_ft_in1k_3','groups convnext_tiny.fb_in22k_ft_in1k_384 '),
            ('finetune photos --arch tf_efficientnet_lite0.','finetune photos --arch tf_efficientnet_lite0.in1k '), ('finetune x --strategy gradual','finetune x --strategy gradual_unfreeze '),
            ('compare x --arch resnet18 --strategies lp_ft fa','compare x --arch resnet18 --strategies lp_ft fastai '), ('demo --data el','demo --data elpv '),
            ('finetune --weights','finetune --weights-file '), ('finetune pho','finetune photos/'), ('completion z','completion zsh ')]:
            assert bash.complete(f'fastai-discriminative {line}')==f'fastai-discriminative {want}'
    finally: bash.close()

@pytest.mark.skipif(not shutil.which('fish'), reason='fish is not installed: `apt-get install fish`')
def test_fish(script, tmp_path, capsys):
    ask = f"source {script('fish', capsys)}; complete -C 'fastai-discriminative preset vit_base_patch16_224.ma'; complete -C 'fastai-discriminative finetune x --strategy lp'"
    res = subprocess.run(['fish','--no-config','-c',ask], capture_output=True, text=True, env={**os.environ, 'HOME':str(tmp_path)})
    assert [o.split('\t')[0] for o in res.stdout.splitlines()]==['vit_base_patch16_224.mae','lp_ft'], res.stderr

@pytest.mark.skipif(not shutil.which('zsh'), reason='zsh is not installed: `apt-get install zsh`')
def test_zsh_finds_its_script(script, tmp_path, capsys):
    shutil.copy(script('zsh', capsys), tmp_path/'_fastai-discriminative')
    ask = f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -D -u; print $_comps[fastai-discriminative]; autoload +X _fastai-discriminative && print read"
    res = subprocess.run(['zsh','-f','-c',ask], capture_output=True, text=True)
    assert res.stdout.split()==['_fastai-discriminative','read'], res.stderr

def test_without_shtab(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'shtab', None)
    assert main(['completion','bash'])==2
    assert capsys.readouterr().err.strip()=='fastai-discriminative: error: Completion needs the package shtab, which is not installed: `pip install shtab`.'
