"""Oracle testing: the fine network sees the box of the label, along one plane; an upper bound.

Reads the snapshot of mode J and the labels; writes results/oracle_testing_*/SNAPSHOT/results.txt and
volumes/EPOCH_CASE.npz, round(255 p) as uint8.
"""

from running import script
from volumes.testing import evaluate_plane, parse


def main():
    evaluate_plane(parse(__doc__), 'oracle', 'O')


if __name__ == '__main__':
    script.run(main)
