"""How a posterior is answered: one algorithm, one file."""

from bayes_klrl.inference.annealing import AnnealedSMC as AnnealedSMC
from bayes_klrl.inference.bayesian_svi import BayesianSVI as BayesianSVI
from bayes_klrl.inference.best_of_n import BestOfN as BestOfN
from bayes_klrl.inference.conditional_smc import ConditionalSMC as ConditionalSMC
from bayes_klrl.inference.exact import Exact as Exact
from bayes_klrl.inference.importance import ImportanceSampling as ImportanceSampling
from bayes_klrl.inference.mcmc import SuffixMH as SuffixMH
from bayes_klrl.inference.quasi_rejection import QuasiRejection as QuasiRejection
from bayes_klrl.inference.rejection import RejectionSampling as RejectionSampling
from bayes_klrl.inference.smc import SMC as SMC
from bayes_klrl.inference.svi import SVI as SVI
