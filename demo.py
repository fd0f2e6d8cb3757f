"""The whole path on the embedded data set, by the same scripts that a user runs: `make demo`.

    python demo.py --minutes 20

Renders and preprocesses the faces, trains CLIP, prior and decoder within the budget of minutes,
samples captions of `combo` (attribute combinations that training never saw) and judges them by the
probe. Writes report.json, samples.mp4, sheet.png and index.html into its folder. Started again it
continues: finished stages are not run again.
"""

import argparse

from dalle2_video.evaluation.demo import Demo


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="budget for everything (20)")
    parser.add_argument("--run-dir", help="runs/demo, or runs/demo<minutes> for another budget")
    parser.add_argument("--data", default="data/faces", help="where the faces lie or go")
    parser.add_argument("overrides", nargs="*", help="key=value for all scripts, as in configs/")
    arguments = parser.parse_args()
    name = "demo" if arguments.minutes == 20 else f"demo{arguments.minutes:g}"
    run_dir = arguments.run_dir or f"runs/{name}"
    Demo(arguments.minutes, run_dir, arguments.data, arguments.overrides).run()


if __name__ == "__main__":
    main()
