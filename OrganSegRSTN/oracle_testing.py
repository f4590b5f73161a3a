"""Oracle testing: as coarse testing, but the fine network looks at the box of the label: an upper bound.

Reads the snapshot of mode J and the labels; writes results/oracle_testing_*/SNAPSHOT/results.txt and volumes/EPOCH_CASE.npz, round(255 p) as uint8.
"""

from running import arguments, script
from scans import nifti
from volumes.testing import evaluate_plane


def main():
    made = arguments.parser(__doc__, arguments.TESTING, arguments.TESTING_OPTIONAL)
    arguments.add_precision(made)
    nifti.add_option(made)
    arguments.add_overwrite(made)
    evaluate_plane(arguments.parse(made), 'oracle', 'O')


if __name__ == '__main__':
    script.run(main)
