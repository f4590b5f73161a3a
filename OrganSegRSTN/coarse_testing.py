"""Coarse testing (section 3.3): the coarse network sees every slice of a fold's test cases along one plane.

Reads the snapshot of mode J; writes results/coarse_testing_*/SNAPSHOT/results.txt and volumes/EPOCH_CASE.npz, round(255 p) as uint8.
"""

from running import arguments, script
from scans import nifti
from volumes.testing import evaluate_plane


def main():
    made = arguments.parser(__doc__, arguments.TESTING, arguments.TESTING_OPTIONAL)
    arguments.add_precision(made)
    nifti.add_option(made)
    arguments.add_overwrite(made)
    evaluate_plane(arguments.parse(made), 'coarse', 'C')


if __name__ == '__main__':
    script.run(main)
