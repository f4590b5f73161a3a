#!/usr/bin/env bash
# Makes the pictures in this folder anew from the demo's results: bash docs/pictures.sh DATA_PATH (needs chromium)
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DATA=$(realpath "$1")
PYTHON=${PYTHON:-$HERE/../.venv/bin/python}

"$PYTHON" "$HERE/phantom.py" "$DATA" "$DATA"/results/coarse2fine_testing_*/FD0:XJ3_1_*

snapshots=("$DATA"/models/snapshots/*/FD0:{X,Y,Z}J3_1_*.pkl)
"$PYTHON" "$HERE/../OrganSegRSTN/predict.py" "$DATA/phantom/DOI/PANCREAS_0001" "$DATA/mask.nii.gz" "${snapshots[@]}" \
  --device cpu --explain "$DATA/explained"
"$PYTHON" "$HERE/predict.py" "$DATA/phantom/DOI/PANCREAS_0001" "$DATA/mask.nii.gz"

chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,2170 \
  --screenshot="$HERE/report.png" "file://$DATA/report/index.html" 2>/dev/null
cp "$DATA/check_data_1.png" "$HERE/check_data.png"
cp "$DATA/explained/Z.png" "$HERE/saliency.png"

for picture in report check_data saliency; do  # without white margins, smaller, and of 256 colours
  "$PYTHON" - "$HERE/$picture.png" <<'END'
import sys
from PIL import Image, ImageOps
picture = Image.open(sys.argv[1]).convert('RGB')
picture = ImageOps.expand(picture.crop(ImageOps.invert(picture).getbbox()), 12, 'white')
picture.thumbnail((1000, 2000))
picture.quantize(256).save(sys.argv[1], optimize=True)
END
done
ls -l "$HERE"/*.png
