"""Fine-tune pretrained vision backbones in fastai with the right learning rate in every layer

A new head is random and has to move fast; pretrained layers are good and want to be fine-tuned, not distorted. fastai can give each group of layers its own learning rate. But it knows the
layers of 21 models only: every timm backbone gets two groups, and a freeze that does not quite freeze.
This package knows the layers of every timm architecture and of models of your own, the rates at which such layers were fine-tuned before, and how to find out what yours can bear.
The training loop, the data and the callbacks stay fastai's, and nothing changes until you ask for it.

Modules:

- `fastai_discriminative.auto`: The default strategy: train the head, test how fast the body may learn on your data, then train everything
- `fastai_discriminative.backbone`: Clean parameter names, the norm layers of a model, and where its pretrained backbone is
- `fastai_discriminative.best`: Keep the weights of the best epoch during a fit, and restore them at its end
- `fastai_discriminative.builder`: `vision_learner` with layer groups and a preset, for any architecture of timm, torchvision or fastai
- `fastai_discriminative.checks`: Run every check of a splitter or a family with one line of pytest
- `fastai_discriminative.cli`: `fastai-discriminative`: fine-tune on a folder of images, look at groups and presets, run the demo
- `fastai_discriminative.compare`: Compare fine-tuning strategies on your own data, with several seeds, in one call
- `fastai_discriminative.coverage`: Which architectures were checked, how their layers were found, and which checks fail
- `fastai_discriminative.demo`: Real pretrained weights and real images without a download, and a fair race against fastai's `fine_tune`
- `fastai_discriminative.families`: The built-in families: their layers in execution order, and the published recipes that apply
- `fastai_discriminative.fast_math`: Use channels-last memory and bfloat16 if they are faster on your machine
- `fastai_discriminative.features`: Compute the features of frozen layers once, and train the remaining layers on them
- `fastai_discriminative.files`: Files that are whole or not there, and folders that go with their owner, however it ends
- `fastai_discriminative.findings`: The checks behind `preflight`: what is unusual about a planned fit, with numbers and a fix
- `fastai_discriminative.finite`: The first thing that is not finite, by its name, when a loss is NaN
- `fastai_discriminative.fit_look`: What a fit is going to do, and what one batch of it costs, before it begins
- `fastai_discriminative.freeze`: True freezing: frozen layers do not change by one bit, and `train_norm` decides which norm layers train
- `fastai_discriminative.group_table`: `learn.layer_groups`: everything known about a learner's layer groups, as a table and as a DataFrame
- `fastai_discriminative.groups`: Divide any model into named layer groups in execution order, with the new head last
- `fastai_discriminative.holding`: Callbacks that take something of a learner while it trains, and give it back however the fit ends
- `fastai_discriminative.html_report`: One HTML file about a fine-tune: groups, rates, history, evidence, environment, and the code to repeat it
- `fastai_discriminative.jobs`: What the commands do: train once, with several seeds, in folds or by several strategies, and predict; and what they leave behind
- `fastai_discriminative.keys`: What kept features depend on, in a form that can be compared
- `fastai_discriminative.layers`: For each parameter of a model: its layer and depth, and whether it is new, in a norm, without weight decay, shared or unused
- `fastai_discriminative.learner`: Layer groups, preset learning rates and true freezing for any fastai `Learner`
- `fastai_discriminative.lr_finder`: Find a learning rate for each group, by short annealed trials or by a range test
- `fastai_discriminative.moments`: What an optimiser remembers of each parameter: its layout in memory, its saved form, and the way back
- `fastai_discriminative.names`: Use names instead of group numbers, and set learning rates for a few groups by name
- `fastai_discriminative.opt_state`: The state of fastai's own optimisers, and of torch's in `OptimWrapper`, saved and loaded by the names of the parameters
- `fastai_discriminative.optimizer`: torch's fused AdamW and SGD for fastai: any number of groups, no weight decay for norms and biases, frozen groups that stay unchanged
- `fastai_discriminative.paths`: What a layer is, which layers belong together, and how deep each layer is between input and head
- `fastai_discriminative.phases`: Fine-tune in phases: which groups train, for how long and how fast, all in one fit
- `fastai_discriminative.pictures`: Lines and maps of layer groups over time, with names that can be read for three groups and for forty
- `fastai_discriminative.points`: Choose the best of the head alone, the final weights, their average and a point in between
- `fastai_discriminative.predict`: From trained learners to a submission: a folder or a table of images, test-time augmentation, ensembles, out-of-fold predictions
- `fastai_discriminative.prefix`: The part of a model that depends on nothing that trains, and what the rest of the model uses of it
- `fastai_discriminative.presets`: Learning rates for a pretrained backbone, derived from published recipes and the way its checkpoint was trained
- `fastai_discriminative.probe`: Ask a model and its data something, and leave both as they were
- `fastai_discriminative.ranks`: Several processes that train one model: gradients of all that trains are averaged, and every process decides the same
- `fastai_discriminative.rates`: Plot the learning rate of each group, before a fit or after it
- `fastai_discriminative.recorder`: Measure each group's gradients and updates, and log its hyper-parameters to CSV files, TensorBoard and W&B
- `fastai_discriminative.registry`: Find the family that an architecture belongs to, or register a new one
- `fastai_discriminative.report`: Measure what a fine-tune did to the pretrained layers: how far their weights moved, and how much their outputs changed
- `fastai_discriminative.resume`: Continue a fit that was interrupted or killed, bit for bit as if it had never stopped
- `fastai_discriminative.rules`: Check any splitter against four rules, and name every parameter that breaks one
- `fastai_discriminative.schedules`: Schedules and a recorder that cost next to nothing a batch, and give the same numbers bit for bit
- `fastai_discriminative.strategies`: Twelve common ways to fine-tune by name, each with its source and when to use it
- `fastai_discriminative.time_limit`: End a fit in time, with what it has come to
- `fastai_discriminative.trace`: The order in which a model really uses its parameters
- `fastai_discriminative.weights`: Load and check local checkpoints, and build timm and torchvision bodies that fit fastai's head"""

__version__ = "0.0.1"
