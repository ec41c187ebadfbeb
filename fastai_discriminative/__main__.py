"`python -m fastai_discriminative`: the command `fastai-discriminative`"
import sys
from .cli import main

if __name__=='__main__': sys.exit(main())
