"""The picture on the first page: who trains when and how fast, and what comes of it

    python benchmarks/plot_answer.py      # results/tuned -> nbs/images/answer.png
"""
import json,sys
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np
from fastai.vision.all import accuracy,set_seed
from fastai_discriminative.all import *
from fastai_discriminative.demo import clipart_path,demo_dls,lite0_weights

here = Path(__file__).parent
sets = dict(clipart='drawings', elpv='solar cells', fashion='Fashion-MNIST')
rows = [('fine_tune 0.002','fine_tune, defaults','#999999','D'), ('tuned','fine_tune, best of 4 rates','#000000','s'), ("auto's head",'head alone, cached','#E69F00','^'), ('auto','auto','#0072B2','o')]

def _tuned(c):
    "Name of the base rate of `fine_tune` that is best on the validation images of the first seed"
    return max((j for j in c.jobs if j['strategy'].startswith('fine_tune 0') and j['seed']==0), key=lambda j: j['score']['valid'])['strategy']

def accuracies(ax):
    "Test accuracy on each set, with 95 % intervals over seeds"
    for y,(k,title) in enumerate(reversed(sets.items())):
        c = StrategyComparison.load(here/'results'/'tuned'/f'{k}-lite0-160-600-10.json')
        t = c.table('test')
        for i,(name,label,color,m) in enumerate(rows):
            r = t.loc[_tuned(c) if name=='tuned' else name]
            ax.errorbar(100*r.test, y+.24-.16*i, xerr=0 if np.isnan(r['±']) else 100*r['±'], color=color, marker=m, ms=7, capsize=3, lw=0, elinewidth=1.5, label=label if y==0 else None)
    ax.set(yticks=range(len(sets)), yticklabels=list(reversed(sets.values())), xlabel='accuracy on images no fit saw (%)', title='What comes of it: 600 images, 10 epochs, 160 px', ylim=(-.6,2.5))
    ax.grid(axis='x', alpha=.25)
    ax.spines[['top','right','left']].set_visible(False)
    ax.tick_params(axis='y', length=0)
    ax.legend(frameon=False, fontsize=9, loc='lower left', bbox_to_anchor=(0,-.01))

def main():
    set_seed(42)
    learn = discriminative_learner(demo_dls(clipart_path(), 600, 160), 'tf_efficientnet_lite0', weights_file=lite0_weights(), metrics=accuracy)
    fig,axs = plt.subplots(2, 1, figsize=(6.2,7.4), layout='constrained', height_ratios=(1,1.1))
    learn.plot_strategy('auto', 10, axs[0])
    axs[0].set_title("Who trains when, and how fast: auto")
    accuracies(axs[1])
    dst = here.parent/'nbs'/'images'/'answer.png'
    dst.parent.mkdir(exist_ok=True)
    fig.savefig(dst, dpi=110)
    print(dst)

if __name__=='__main__': main()
