"""Fine-tune pretrained vision backbones in fastai with the right learning rate in every layer

A new head is random and has to move fast; pretrained layers are good and want to be fine-tuned, not distorted. fastai can give each group of layers its own learning rate. But it knows the
layers of 21 models only: every timm backbone gets two groups, and a freeze that does not quite freeze.
This package knows the layers of every timm architecture and of models of your own, the rates at which such layers were fine-tuned before, and how to find out what yours can bear.
The training loop, the data and the callbacks stay fastai's, and nothing changes until you ask for it.

Modules:

- `fastai_discriminative.auto`: The strategy that measures before it moves: the head first, then rates for the body from a look at this model and these data
- `fastai_discriminative.backbone`: What a model is called inside wrappers, which of its modules are norms, and where in it the pretrained backbone is
- `fastai_discriminative.best`: The weights of the best epoch, kept while a fit goes on, and put back when it is over
- `fastai_discriminative.builder`: A learner in layer groups for any architecture of timm, torchvision or fastai, with the arguments of `vision_learner`
- `fastai_discriminative.checks`: The whole battery of proofs for a splitter or a family, in one line of pytest
- `fastai_discriminative.cli`: `fastai-discriminative`: fine-tune on a folder of images, look at groups and presets, run the demo
- `fastai_discriminative.compare`: Should new layers learn faster than pretrained ones? Ask your own data: several strategies, several seeds, one call
- `fastai_discriminative.core`: What every room of the package needs: errors, hints, tables in text and HTML, packaged data
- `fastai_discriminative.coverage`: What was proved, for which architectures, by which rule, and where it does not hold
- `fastai_discriminative.demo`: Real pretrained weights and real images without a download, and a fair race against fastai's `fine_tune`
- `fastai_discriminative.families`: The built-in families: how their layers follow each other, and which published recipes apply
- `fastai_discriminative.fast_math`: Channels-last memory and bfloat16, where this machine gains by them
- `fastai_discriminative.features`: What frozen layers make of an image, computed once: the frozen prefix of a model, and training on its cached results
- `fastai_discriminative.files`: Files that are whole or not there, and folders that go with their owner, however it ends
- `fastai_discriminative.findings`: What is unusual about a fit to come, with the numbers that show it and the line that mends it
- `fastai_discriminative.finite`: The first thing that is not finite, by its name, when a loss is NaN
- `fastai_discriminative.fit_look`: What a fit is going to do, and what one batch of it costs, before it begins
- `fastai_discriminative.freeze`: A freeze that freezes: what is frozen does not move by one bit, and norm layers follow one choice
- `fastai_discriminative.group_table`: All that is known about a learner's layer groups, as a table to read and as numbers to compute with
- `fastai_discriminative.groups`: A model's layers, named, in execution order, gathered into as many groups as you ask for
- `fastai_discriminative.holding`: Callbacks that take something of a learner while it trains, and give it back however the fit ends
- `fastai_discriminative.html_report`: One file that tells what a fine-tune was: groups, rates, history, evidence, environment, and the code to repeat it
- `fastai_discriminative.image_folder`: Your own images and their labels: folders of classes or a table, what is refused and why, and a fair deal into parts
- `fastai_discriminative.image_table`: Which column of a table names the images, and which holds their labels
- `fastai_discriminative.jobs`: What the commands do: train once, with several seeds, in folds or by several strategies, and predict; and what they leave behind
- `fastai_discriminative.keys`: What kept features depend on, in a form that can be compared
- `fastai_discriminative.layers`: For each parameter of a model: its layer, its depth, and whether it is new, a norm's, undecayed, shared or unused
- `fastai_discriminative.learner`: fastai's `Learner`, in layer groups, at the preset's learning rates, with a freeze that freezes
- `fastai_discriminative.lr_finder`: Which rates? A range test along the preset's slope, one group at a time, or short annealed trials
- `fastai_discriminative.moments`: What an optimiser remembers of each parameter: its layout in memory, its saved form, and the way back
- `fastai_discriminative.names`: A group by its name wherever a group is meant, and a rate for every group from a few by name
- `fastai_discriminative.opt_state`: The state of fastai's own optimisers, and of torch's in `OptimWrapper`, saved and loaded by the names of the parameters
- `fastai_discriminative.optimizer`: Fused torch optimisers behind fastai's optimiser contract: any number of depth groups, no decay where none belongs, frozen groups that do not move
- `fastai_discriminative.paths`: What a layer is, which layers belong together, and how deep each is on the way from the input to the head
- `fastai_discriminative.phases`: Who trains, for how long, how fast: a fit in phases, as one fit
- `fastai_discriminative.pictures`: Lines and maps of layer groups over time, with names that can be read for three groups and for forty
- `fastai_discriminative.points`: Averaged weights, and the choice between the head alone, the end of a fit, and what lies between
- `fastai_discriminative.predict`: From trained learners to a submission: a folder or a table of images, test-time augmentation, ensembles, out-of-fold predictions
- `fastai_discriminative.prefix`: The part of a model that depends on nothing that trains, and what the rest of the model uses of it
- `fastai_discriminative.preflight`: A look before the fit: what will happen, how long it takes, and what is unusual, each with the line that mends it
- `fastai_discriminative.presets`: Learning rates for the layers of a pretrained backbone, derived from published recipes and the way its checkpoint was trained
- `fastai_discriminative.probe`: Ask a model and its data something, and leave both as they were
- `fastai_discriminative.ranks`: Several processes that train one model: gradients of all that trains are averaged, and every process decides the same
- `fastai_discriminative.rates`: How fast each group will learn, before a fit, and how fast it did, after it
- `fastai_discriminative.recorder`: How large each group's gradients and updates are, and every group's hyper-parameters in CSV files, TensorBoard and W&B
- `fastai_discriminative.registry`: Which family an architecture belongs to, and what the package knows about that family
- `fastai_discriminative.report`: What a fine-tune did to the pretrained layers: how far they moved, and whether they still say the same
- `fastai_discriminative.resume`: A fit that goes on where it was killed, bit for bit as if nothing had happened
- `fastai_discriminative.rules`: Four rules that any splitter has to keep, and what breaks them by name
- `fastai_discriminative.schedules`: Schedules and a recorder that cost next to nothing a batch, and give the same numbers bit for bit
- `fastai_discriminative.strategies`: Every common practice of fine-tuning by name, with its source
- `fastai_discriminative.time_limit`: End a fit in time, with what it has come to
- `fastai_discriminative.trace`: The order in which a model really uses its parameters
- `fastai_discriminative.weights`: Checkpoints from files, and bodies of timm and torchvision that a head can read"""

__version__ = "0.0.1"
