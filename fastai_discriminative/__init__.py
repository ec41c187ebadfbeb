"""Fine-tune pretrained vision backbones in fastai with the right learning rate in every layer

A new head is random and has to learn fast. Pretrained layers are already good and need only small changes. fastai can give each group of layers its own learning rate, but it knows the layers of
only 21 models. Every timm backbone gets two groups, and after `freeze` a part of the frozen layers still changes.
This package knows the layers of every timm architecture and of your own models. It knows the learning rates at which such layers were fine-tuned before, and it can measure which rates suit your data.
The training loop, the data and the callbacks are still fastai's, and nothing changes until you ask for it.

Modules:

- `fastai_discriminative.auto`: The default strategy: train the head, test how fast the body may learn on your data, then train everything
- `fastai_discriminative.backbone`: Clean parameter names, the norm layers of a model, and where its pretrained backbone is
- `fastai_discriminative.best`: Keep the weights of the best epoch during a fit, and restore them at its end
- `fastai_discriminative.builder`: `vision_learner` with layer groups and a preset, for any architecture of timm, torchvision or fastai
- `fastai_discriminative.checks`: Run every check of a splitter or a family with one line of pytest
- `fastai_discriminative.cli`: `fastai-discriminative`: fine-tune on a folder of images, write a submission, show groups and presets, run the demo
- `fastai_discriminative.compare`: Compare fine-tuning strategies on your own data, with several seeds, in one call
- `fastai_discriminative.coverage`: Which architectures were checked, how their layers were found, and which checks fail
- `fastai_discriminative.explain`: What `help` says of every parameter
- `fastai_discriminative.families`: The built-in families: their layers in execution order, and the published recipes that apply
- `fastai_discriminative.fast_math`: Use channels-last memory and bfloat16 if they are faster on your machine
- `fastai_discriminative.features`: Compute the features of frozen layers once, and train the remaining layers on them
- `fastai_discriminative.files`: Files that are complete or absent, and temporary folders that are removed even if their process is killed
- `fastai_discriminative.findings`: The checks behind `preflight`: what is unusual about a planned fit, with numbers and a fix
- `fastai_discriminative.finite`: When a loss is NaN, find the tensor in which the first NaN or infinity appeared
- `fastai_discriminative.fit_look`: Find out what a fit will do and what it will cost, with one batch, before it begins
- `fastai_discriminative.freeze`: True freezing: frozen layers do not change by one bit, and `train_norm` decides which norm layers train
- `fastai_discriminative.group_table`: `learn.layer_groups`: everything known about a learner's layer groups, as a table and as a DataFrame
- `fastai_discriminative.groups`: Divide any model into named layer groups in execution order, with the new head last
- `fastai_discriminative.holding`: A base class for callbacks that change a learner during a fit, and undo it however the fit ends
- `fastai_discriminative.html_report`: One HTML file about a fine-tune: groups, rates, history, evidence, environment, and the code to repeat it
- `fastai_discriminative.image_folder`: Find your own images and their labels in folders or a table, and divide them into parts with the same share of each class
- `fastai_discriminative.image_table`: Find the columns of a table that hold the image names and the labels
- `fastai_discriminative.jobs`: The code behind the commands: train once, with several seeds, in folds or by several strategies, predict, and save the results
- `fastai_discriminative.layers`: For each parameter of a model: its layer and depth, and whether it is new, in a norm, without weight decay, shared or unused
- `fastai_discriminative.learner`: Layer groups, preset learning rates and true freezing for any fastai `Learner`
- `fastai_discriminative.lr_finder`: Find a learning rate for each group, by short annealed trials or by a range test
- `fastai_discriminative.moments`: An optimiser's moments: their memory layout, their saved form, and how they are loaded
- `fastai_discriminative.names`: Use names instead of group numbers, and set learning rates for a few groups by name
- `fastai_discriminative.opt_state`: Save and load the state of any fastai optimiser, or of torch's in `OptimWrapper`, by parameter names
- `fastai_discriminative.optimizer`: torch's fused AdamW and SGD for fastai: any number of groups, no weight decay for norms and biases, frozen groups that stay unchanged
- `fastai_discriminative.paths`: What a layer is, which layers belong together, and how deep each layer is between input and head
- `fastai_discriminative.phases`: Fine-tune in phases: which groups train, for how long and how fast, all in one fit
- `fastai_discriminative.pictures`: Line plots and maps of layer groups over time, with readable names for three groups or forty
- `fastai_discriminative.points`: Choose the best of the head alone, the final weights, their average and a point in between
- `fastai_discriminative.predict`: From trained learners to a submission: a folder or table of images, test-time augmentation, ensembles, out-of-fold predictions
- `fastai_discriminative.presets`: Learning rates for a pretrained backbone, derived from published recipes and the way its checkpoint was trained
- `fastai_discriminative.probe`: Inspect a model and its data without changing them or the random numbers
- `fastai_discriminative.ranks`: Train one model in several processes: average the gradients of all training parameters, and let all processes make the same decisions
- `fastai_discriminative.rates`: Plot the learning rate of each group, before a fit or after it
- `fastai_discriminative.recorder`: Measure each group's gradients and updates, and log its hyper-parameters to CSV files, TensorBoard and W&B
- `fastai_discriminative.registry`: Find the family that an architecture belongs to, or register a new one
- `fastai_discriminative.report`: Measure what a fine-tune did to the pretrained layers: how far their weights moved, and how much their outputs changed
- `fastai_discriminative.resume`: Continue a fit that was interrupted or killed, bit for bit as if it had never stopped
- `fastai_discriminative.rules`: Check any splitter against four rules, and name every parameter that breaks one
- `fastai_discriminative.run_progress`: What a run of a command has finished, kept in its folder, so that `--resume` continues an interrupted or killed run
- `fastai_discriminative.same_fit`: Describe a fit in plain numbers and text, so that another process can tell whether it runs the same one
- `fastai_discriminative.strategies`: Twelve common ways to fine-tune by name, each with its source and when to use it
- `fastai_discriminative.trace`: The order in which a model really uses its parameters
- `fastai_discriminative.weights`: Load and check local checkpoints, and build timm and torchvision bodies that fit fastai's head"""

__version__ = "0.1.0"
