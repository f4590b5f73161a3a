#!/usr/bin/env bash
# OrganSegRSTN. Edit the values below, or give them in the environment, and run: bash run.sh
# LAZY_MODE=1 runs everything; DRY_RUN=1 prints the commands instead. README.md explains every flag.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exists() { [[ -e $1 ]]; }  # exists FOLDER/*: does anything match? (quoted, a name may hold any character)

#### What to run ######################################################################################################
: "${LAZY_MODE:=0}"                     # 1: all of these stages, on all three planes
: "${DRY_RUN:=0}"                       # 1: print the commands, run nothing
: "${ENABLE_DICOM2NPY:=0}"              # DICOM series in RAW_PATH -> images/
: "${ENABLE_NII2NPY:=0}"                # NIfTI labels (and images) in RAW_PATH -> labels/ (and images/)
: "${ENABLE_INITIALIZATION:=0}"         # slices and lists; once for a data set
: "${ENABLE_CHECK_DATA:=$ENABLE_INITIALIZATION}"  # looks over the data; DATA_PATH/check_data.png shows every case
: "${ENABLE_PRETRAINING:=0}"            # an FCN-8s to start from; once for a fold
: "${ENABLE_TRAINING:=0}"
: "${ENABLE_COARSE_TESTING:=0}"
: "${ENABLE_COARSE_FUSION:=0}"
: "${ENABLE_ORACLE_TESTING:=0}"
: "${ENABLE_ORACLE_FUSION:=0}"
: "${ENABLE_COARSE2FINE_TESTING:=0}"
: "${ENABLE_REPORT:=0}"                 # DATA_PATH/report/index.html: figures and pictures of all results

#### On what ##########################################################################################################
: "${DATA_PATH:=$HERE/data}"            # images/, labels/, and all that is made of them
: "${RAW_PATH:=}"                       # raw scans to convert
: "${LABEL_ORIENTATION:=auto}"          # how nii2npy.py turns a label onto its image: auto, affine or published
: "${PYTHON:=}"                         # the python of an environment of your own; none: .venv is made here
: "${PRECISION:=fp32}"                  # bf16: faster on CPUs and GPUs that have it; DSCs differ in the third digit
: "${SEED:=}"                           # a whole number makes pretraining and training repeatable

# for convenience: what each stage below takes unless it is told otherwise
: "${CURRENT_ORGAN_ID:=1}"              # or several: "1 3 4"
: "${CURRENT_PLANE:=A}"                 # X, Y, Z, or A for all three
: "${CURRENT_FOLD:=0}"                  # or A for all folds
: "${CURRENT_GPU:=${CURRENT_FOLD/A/0}}" # number of a CUDA device, or cpu; several, a process each: 0,1
: "${PLANE_GPUS:=}"                     # "0 1 2": train and test X, Y and Z at once, each on its own
: "${TORCHRUN_ARGS:=}"                  # several machines (README.md): what torchrun takes instead of --standalone

#### DEMO SETTINGS ####################################################################################################
# They serve the built-in phantom only, which lazy mode makes where DATA_PATH holds no images and no RAW_PATH is named.
if [[ -z $RAW_PATH ]] &&
  { [[ -e $DATA_PATH/phantom ]] || { [[ $LAZY_MODE == 1 ]] && ! exists "$DATA_PATH"/images/*.npy; }; }; then
  DEMO=1
  PHANTOM_CASES=16
  : "${ORGAN_NUMBER:=8}"
  : "${PRETRAINING_WIDTH:=8}"           # the paper's network has 64: days on a CPU
  : "${PRETRAINING_EPOCHS:=8}"
  : "${PRETRAINING_LEARNING_RATE:=1e-3}"
  : "${LEARNING_RATE1:=1e-4}"           # a narrow network learns faster
  : "${LEARNING_RATE_M1:=3}"
  : "${TRAINING_EPOCH_S:=1}"
  : "${TRAINING_EPOCH_I:=1}"
  : "${TRAINING_EPOCH_J:=3}"
  : "${LR_DECAY_EPOCH_J_STEP:=1}"
  : "${TRAINING_MARGIN:=10}"            # of voxels of 3.3 mm
  : "${MAX_ROUNDS:=3}"
  : "${SEED:=0}"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # so narrow a network gains nothing from more
else
  DEMO=0
fi
#### END OF DEMO SETTINGS #############################################################################################

#### Data #############################################################################################################
: "${ORGAN_NUMBER:=1}"                  # organs that the labels hold
: "${FOLDS:=4}"
: "${LOW_RANGE:=-100}"                  # intensity window (HU)
: "${HIGH_RANGE:=240}"
: "${SLICE_THRESHOLD:=0.98}"            # share of the slices with the organ to train on; above 1: least pixels
: "${SLICE_THICKNESS:=3}"               # 1 or 3

#### Pretraining ######################################################################################################
: "${PRETRAINING_EPOCHS:=10}"
: "${PRETRAINING_WIDTH:=64}"            # channels of the first layer; 64 in the paper
: "${PRETRAINING_LEARNING_RATE:=2e-4}"

#### Training #########################################################################################################
: "${TRAINING_ORGAN_ID:=$CURRENT_ORGAN_ID}"
: "${TRAINING_PLANE:=$CURRENT_PLANE}"
: "${TRAINING_GPU:=$CURRENT_GPU}"
: "${LEARNING_RATE1:=1e-5}"             # coarse layers
: "${LEARNING_RATE_M1:=10}"             # times LEARNING_RATE1: saliency and fine layers
: "${LEARNING_RATE2:=1e-5}"             # not used
: "${LEARNING_RATE_M2:=10}"             # not used
: "${TRAINING_MARGIN:=20}"              # pixels around the organ's box
: "${TRAINING_PROB:=0.5}"               # probability of a random margin
: "${TRAINING_SAMPLE_BATCH:=1}"         # draws whose mean is a random margin
: "${TRAINING_EPOCH_S:=2}"
: "${TRAINING_EPOCH_I:=6}"
: "${TRAINING_EPOCH_J:=8}"
: "${LR_DECAY_EPOCH_J_STEP:=2}"         # epochs in J after which the rates halve
: "${FINE_ITERATIONS:=1}"               # the paper's T: fine steps a sample in I and J
OWN_TIMESTAMP=${TRAINING_TIMESTAMP:+0}
if [[ $ENABLE_TRAINING == 1 || $LAZY_MODE == 1 ]]; then
  : "${TRAINING_TIMESTAMP:=$(date +%Y%m%d_%H%M%S)}"
else
  : "${TRAINING_TIMESTAMP:=_}"
fi

#### Testing: a timestamp names the training to test; _ takes the snapshot without one, else the newest ###############
: "${COARSE_TESTING_ORGAN_ID:=$CURRENT_ORGAN_ID}"
: "${COARSE_TESTING_PLANE:=$CURRENT_PLANE}"
: "${COARSE_TESTING_GPU:=$CURRENT_GPU}"
: "${COARSE_TIMESTAMP1:=$TRAINING_TIMESTAMP}"
: "${COARSE_TIMESTAMP2:=$TRAINING_TIMESTAMP}"   # not used, here and below

: "${COARSE_FUSION_ORGAN_ID:=$CURRENT_ORGAN_ID}"
: "${COARSE_FUSION_THRESHOLD:=0.5}"
: "${COARSE_TIMESTAMP1_X:=$COARSE_TIMESTAMP1}"
: "${COARSE_TIMESTAMP1_Y:=$COARSE_TIMESTAMP1}"
: "${COARSE_TIMESTAMP1_Z:=$COARSE_TIMESTAMP1}"

: "${ORACLE_TESTING_ORGAN_ID:=$CURRENT_ORGAN_ID}"
: "${ORACLE_TESTING_PLANE:=$CURRENT_PLANE}"
: "${ORACLE_TESTING_GPU:=$CURRENT_GPU}"
: "${ORACLE_TIMESTAMP1:=$TRAINING_TIMESTAMP}"
: "${ORACLE_TIMESTAMP2:=$TRAINING_TIMESTAMP}"

: "${ORACLE_FUSION_ORGAN_ID:=$CURRENT_ORGAN_ID}"
: "${ORACLE_FUSION_THRESHOLD:=0.5}"
: "${ORACLE_TIMESTAMP1_X:=$ORACLE_TIMESTAMP1}"
: "${ORACLE_TIMESTAMP1_Y:=$ORACLE_TIMESTAMP1}"
: "${ORACLE_TIMESTAMP1_Z:=$ORACLE_TIMESTAMP1}"

: "${COARSE2FINE_TESTING_ORGAN_ID:=$CURRENT_ORGAN_ID}"
: "${COARSE2FINE_TESTING_GPU:=${PLANE_GPUS%% *}}"   # three planes in one process
: "${COARSE2FINE_TESTING_GPU:=$CURRENT_GPU}"
: "${FINE_FUSION_THRESHOLD:=0.5}"
: "${MAX_ROUNDS:=10}"
: "${WRITE_NIFTI:=0}"                   # 1: write the final predictions as .nii.gz, too; those of several organs also merged
: "${STOP_DSC:=}"                       # end a case where two rounds agree so (0.99); empty: all rounds, as published
: "${COARSE2FINE_TIMESTAMP1_X:=$TRAINING_TIMESTAMP}"
: "${COARSE2FINE_TIMESTAMP1_Y:=$TRAINING_TIMESTAMP}"
: "${COARSE2FINE_TIMESTAMP1_Z:=$TRAINING_TIMESTAMP}"

: "${REPORT_REFERENCE:=}"               # a JSON file of figures to show beside ours (README.md)

########################################################################################################################
#### Nothing to edit below ############################################################################################
########################################################################################################################
STAGE=set-up
ended() {  # whatever ends a run that has failed
  local status=$?
  [[ $status != 0 ]] || return 0
  if [[ -z $OWN_TIMESTAMP && -n $(find "$DATA_PATH/models/snapshots" -name "*_$TRAINING_TIMESTAMP.ckpt" 2>/dev/null) ]]; then
    echo "run.sh: to go on where it stopped: TRAINING_TIMESTAMP=$TRAINING_TIMESTAMP before the same command" >&2
  fi
  echo "run.sh: stopped in $STAGE (exit code $status)" >&2
}
stop() {  # stop SIGNAL STATUS: hand a signal on to what is running, and end when that has ended
  trap '' INT TERM HUP
  local group
  for group in $(jobs -p); do kill -s "$1" -- "-$group" 2>/dev/null || true; done
  wait
  exit "$2"
}
trap ended EXIT
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop TERM 129' HUP  # the terminal is gone

for switch in LAZY_MODE DRY_RUN WRITE_NIFTI ENABLE_{DICOM2NPY,NII2NPY,INITIALIZATION,CHECK_DATA,PRETRAINING,TRAINING} \
  ENABLE_{COARSE_TESTING,COARSE_FUSION,ORACLE_TESTING,ORACLE_FUSION,COARSE2FINE_TESTING,REPORT}; do
  [[ ${!switch} == [01] ]] || { echo "$switch is '${!switch}', not 0 or 1" >&2; exit 2; }
done
if [[ $DRY_RUN == 1 ]]; then
  : "${PYTHON:=python}"
else
  source "$HERE/setup.sh"
fi
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # waiting threads sleep: spinning ones starve whatever else runs
[[ $DATA_PATH == /* ]] || DATA_PATH=$PWD/$DATA_PATH  # a name that begins with - is no option
[[ -z $RAW_PATH || $RAW_PATH == /* ]] || RAW_PATH=$PWD/$RAW_PATH
[[ $FOLDS =~ ^[0-9]{1,9}$ ]] || { echo "FOLDS is '$FOLDS', not a whole number" >&2; exit 2; }

call() {  # call ARGUMENT ...: python with these, printed or run
  if [[ $DRY_RUN == 1 ]]; then
    printf '%s' "${SHARE:+OMP_NUM_THREADS=$SHARE }"
    printf '%q ' "$PYTHON" "$@"
    echo
  else
    [[ -z $SHARE ]] || export OMP_NUM_THREADS=$SHARE
    "$PYTHON" "$@"
  fi
}

SHARE=  # threads of each of several processes side by side
share_cores() {  # share_cores PROCESSES; what the user says in OMP_NUM_THREADS goes before
  local cores=${SHARE:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}  # nproc: those that this process may use
  [[ -n ${OMP_NUM_THREADS:-} ]] || SHARE=$((cores > $1 ? cores / $1 : 1))
}

call_on() {  # call_on GPUS SCRIPT ARGUMENT ...: for several (0,1) torchrun starts a process each
  local commas=${1//[^,]/}
  local processes=$((${#commas} + 1))
  if [[ $processes == 1 && -z $TORCHRUN_ARGS ]]; then
    call "$HERE/$2" "${@:3}"
  else
    [[ $processes == 1 ]] || share_cores "$processes"
    # shellcheck disable=SC2086 # several words
    call -m torch.distributed.run ${TORCHRUN_ARGS:---standalone} --nproc_per_node "$processes" "$HERE/$2" "${@:3}"
  fi
}

start() {  # start COMMAND ...: as a JOB, a process group of its own: signals come from `stop`, and are the command's to answer
  JOB=
  if [[ $DRY_RUN == 1 ]]; then
    ("$@")
  else
    set -m
    (set +m; trap : INT TERM; "$@") &
    JOB=$!
    set +m
  fi
}

finish() {  # finish JOB: wait for its end, and fail as it did
  [[ -z $1 ]] || wait "$1"
}

run() {  # run SCRIPT ARGUMENT ...: one command of a stage
  start call "$HERE/$@"
  finish "$JOB"
}

run_on() {  # run_on GPUS SCRIPT ARGUMENT ...: the same on one or several GPUs
  start call_on "$@"
  finish "$JOB"
}

last() {  # last COMMAND ...: the end of a pipe, which sees all of it whatever signals come
  trap '' INT TERM HUP
  "$@"
}

mark() {  # mark WORD: put it before every line
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '%s %s\n' "$1" "$line"; done
}

beside() {  # beside PLANE PLANES COMMAND ...: at once with the others; its lines are marked, and one says that it failed
  local status=0
  share_cores "$(wc -w <<<"$2")"
  if [[ $DRY_RUN == 1 ]]; then
    "${@:3}"
  else
    { "${@:3}" 2>&1 | last mark "$1:"; } || status=$?
    [[ $status == 0 ]] || echo "run.sh: $STAGE failed (exit code $status)" >&2
    return $status
  fi
}

plane_gpu() {  # that of a plane in PLANE_GPUS
  local X Y Z
  read -r X Y Z <<<"$PLANE_GPUS"
  case $1 in
    X) echo "$X" ;;
    Y) echo "$Y" ;;
    Z) echo "$Z" ;;
  esac
}

each_plane() {  # each_plane PLANES GPU FUNCTION ARGUMENT ...: FUNCTION PLANE GPU ARGUMENT ... for each, or at once on PLANE_GPUS
  local stage=$STAGE plane planes jobs='' failed='' status=0
  planes=$(planes "$1")
  for plane in $planes; do
    STAGE="$stage, plane $plane"
    if [[ -z $PLANE_GPUS ]]; then
      start "$3" "$plane" "$2" "${@:4}"
      finish "$JOB"
    else
      start beside "$plane" "$planes" "$3" "$plane" "$(plane_gpu "$plane")" "${@:4}"
      jobs="$jobs $plane:$JOB"
    fi
  done
  STAGE=$stage
  for plane in $jobs; do
    finish "${plane#*:}" || { status=$?; failed="$failed ${plane%:*}"; }
  done
  [[ -z $failed ]] || STAGE="$stage, plane$failed"
  return $status
}

stage() {  # stage SWITCH NAME: is it on? then say so
  [[ $1 == 1 || $LAZY_MODE == 1 ]] || return 1
  STAGE=$2
  echo "#### $STAGE"
}

planes() {  # the planes that X, Y, Z or A stands for
  if [[ $LAZY_MODE == 1 || $1 == A ]]; then echo X Y Z; else echo "$1"; fi
}

folds() {  # the folds that a number or A stands for
  if [[ $CURRENT_FOLD == A ]]; then seq 0 $((FOLDS - 1)); else echo "$CURRENT_FOLD"; fi
}

data_arguments() {  # data_arguments FOLD ORGAN: what the arguments of every stage begin with
  ARGUMENTS=("$DATA_PATH" "$1" "$ORGAN_NUMBER" "$LOW_RANGE" "$HIGH_RANGE" "$SLICE_THRESHOLD" "$SLICE_THICKNESS" "$2")
}

each() {  # each "ORGANS" FUNCTION ARGUMENT ...: call FUNCTION ARGUMENT ... for every fold and organ (in $fold and $organ)
  local fold organ
  for fold in $(folds); do
    for organ in $1; do
      data_arguments "$fold" "$organ"
      "${@:2}"
    done
  done
}
[[ -z $PLANE_GPUS || $(wc -w <<<"$PLANE_GPUS") == 3 ]] || {
  echo "PLANE_GPUS is '$PLANE_GPUS', not one for each of X, Y and Z" >&2
  exit 2
}
RATES=("$LEARNING_RATE1" "$LEARNING_RATE_M1" "$LEARNING_RATE2" "$LEARNING_RATE_M2" "$TRAINING_MARGIN")
EPOCHS=("$TRAINING_EPOCH_S" "$TRAINING_EPOCH_I" "$TRAINING_EPOCH_J" "$LR_DECAY_EPOCH_J_STEP")
SAMPLING=("$TRAINING_PROB" "$TRAINING_SAMPLE_BATCH")
PRECISE=(--precision "$PRECISION")
SEEDED=(${SEED:+--seed "$SEED"})
NIFTI=()
[[ $WRITE_NIFTI != 1 ]] || NIFTI=(--nifti)

if [[ -n $RAW_PATH && -e $DATA_PATH/phantom ]]; then
  echo "$DATA_PATH is the demo's folder: name another DATA_PATH for scans of your own" >&2
  exit 2
fi
if [[ $DEMO == 1 ]]; then
  echo "#### DEMO SETTINGS apply: $DATA_PATH is the phantom's"
fi
if [[ $DEMO == 1 && $LAZY_MODE == 1 ]]; then
  STAGE='making the phantom'
  echo "#### $STAGE"
  RAW_PATH=$DATA_PATH/phantom
  run DATA2NPY/make_phantom.py "$RAW_PATH" --cases "$PHANTOM_CASES"
fi

#### Conversion
nifti_images() { exists "$RAW_PATH"/images*/*.nii*; }
if [[ $LAZY_MODE == 1 && -n $RAW_PATH ]]; then
  ENABLE_NII2NPY=1
  nifti_images || ENABLE_DICOM2NPY=1
fi
convert() {  # convert SWITCH SCRIPT OPTION ...
  [[ $1 == 1 ]] || return 0
  STAGE="conversion ($2)"
  echo "#### $STAGE"
  [[ -n $RAW_PATH ]] || { echo 'RAW_PATH is empty: name the folder of the raw scans' >&2; exit 2; }
  run "DATA2NPY/$2" "$RAW_PATH" "$DATA_PATH" "${@:3}"
}
convert "$ENABLE_DICOM2NPY" dicom2npy.py
convert "$ENABLE_NII2NPY" nii2npy.py --orientation "$LABEL_ORIENTATION"

if stage "$ENABLE_INITIALIZATION" initialization; then
  run OrganSegRSTN/init.py "$DATA_PATH" "$ORGAN_NUMBER" "$FOLDS" "$LOW_RANGE" "$HIGH_RANGE"
fi
if stage "$ENABLE_CHECK_DATA" 'a look at the data'; then
  run OrganSegRSTN/check_data.py "$DATA_PATH" "$ORGAN_NUMBER" "$LOW_RANGE" "$HIGH_RANGE"
fi

#### Pretraining: lazy mode keeps what it finds in models/pretrained
PRETRAINING_GPU=${PLANE_GPUS:-$TRAINING_GPU}
PRETRAINING_GPU=${PRETRAINING_GPU%%[ ,]*}  # one process
pretrain() {
  local folder=$DATA_PATH/models/pretrained
  if [[ $ENABLE_PRETRAINING != 1 ]] &&
    { exists "$folder"/fcn8s_from_*.pth || exists "$folder/fcn8s_FD${fold}_$organ.pth"; }; then
    echo "fold $fold, organ $organ: models/pretrained holds what to start from"
    return
  fi
  STAGE="pretraining of fold $fold, organ $organ"
  run OrganSegRSTN/pretrain.py "${ARGUMENTS[@]}" "$PRETRAINING_GPU" "$PRETRAINING_EPOCHS" --width "$PRETRAINING_WIDTH" \
    --learning_rate "$PRETRAINING_LEARNING_RATE" --crop_margin "$TRAINING_MARGIN" --resume "${PRECISE[@]}" ${SEEDED[@]+"${SEEDED[@]}"}
}
if stage "$ENABLE_PRETRAINING" pretraining; then
  each "$TRAINING_ORGAN_ID" pretrain
fi

train_plane() {  # train_plane PLANE GPU; its output is kept in DATA_PATH/logs, too
  local script=training.py
  [[ $2 != *,* && -z $TORCHRUN_ARGS ]] || script=training_parallel.py
  call_on "$2" "OrganSegRSTN/$script" "${ARGUMENTS[@]}" "$1" "$2" "${RATES[@]}" "${SAMPLING[@]}" "${EPOCHS[@]}" \
    "$TRAINING_TIMESTAMP" --resume --fine_iterations "$FINE_ITERATIONS" "${PRECISE[@]}" ${SEEDED[@]+"${SEEDED[@]}"}
}
train() {
  STAGE="training of fold $fold, organ $organ"
  each_plane "$TRAINING_PLANE" "$TRAINING_GPU" train_plane
}
if stage "$ENABLE_TRAINING" training; then
  each "$TRAINING_ORGAN_ID" train
fi

test_plane() {  # test_plane PLANE GPU KIND TIMESTAMP1 TIMESTAMP2
  call_on "$2" "OrganSegRSTN/$3_testing.py" "${ARGUMENTS[@]}" "$1" "$2" "${RATES[@]}" "${SAMPLING[@]}" "${EPOCHS[@]}" \
    "$4" "$5" "${PRECISE[@]}" ${NIFTI[@]+"${NIFTI[@]}"}
}
test_planes() {  # test_planes KIND PLANES GPU TIMESTAMP1 TIMESTAMP2
  STAGE="$1 testing of fold $fold, organ $organ"
  each_plane "$2" "$3" test_plane "$1" "$4" "$5"
}

fuse() {  # fuse KIND THRESHOLD TIMESTAMP1_X TIMESTAMP1_Y TIMESTAMP1_Z
  STAGE="$1 fusion of fold $fold, organ $organ"
  run "OrganSegRSTN/$1_fusion.py" "${ARGUMENTS[@]}" "$CURRENT_GPU" "${RATES[@]}" "${EPOCHS[@]}" "${@:2}" \
    ${NIFTI[@]+"${NIFTI[@]}"}
}

if stage "$ENABLE_COARSE_TESTING" 'coarse testing'; then
  each "$COARSE_TESTING_ORGAN_ID" test_planes coarse "$COARSE_TESTING_PLANE" "$COARSE_TESTING_GPU" \
    "$COARSE_TIMESTAMP1" "$COARSE_TIMESTAMP2"
fi
if stage "$ENABLE_COARSE_FUSION" 'coarse fusion'; then
  each "$COARSE_FUSION_ORGAN_ID" fuse coarse "$COARSE_FUSION_THRESHOLD" \
    "$COARSE_TIMESTAMP1_X" "$COARSE_TIMESTAMP1_Y" "$COARSE_TIMESTAMP1_Z"
fi
if stage "$ENABLE_ORACLE_TESTING" 'oracle testing'; then
  each "$ORACLE_TESTING_ORGAN_ID" test_planes oracle "$ORACLE_TESTING_PLANE" "$ORACLE_TESTING_GPU" \
    "$ORACLE_TIMESTAMP1" "$ORACLE_TIMESTAMP2"
fi
if stage "$ENABLE_ORACLE_FUSION" 'oracle fusion'; then
  each "$ORACLE_FUSION_ORGAN_ID" fuse oracle "$ORACLE_FUSION_THRESHOLD" \
    "$ORACLE_TIMESTAMP1_X" "$ORACLE_TIMESTAMP1_Y" "$ORACLE_TIMESTAMP1_Z"
fi

COARSE2FINE=("$COARSE2FINE_TESTING_GPU" "${RATES[@]}" "${EPOCHS[@]}" \
  "$COARSE_FUSION_THRESHOLD" "$FINE_FUSION_THRESHOLD" "$MAX_ROUNDS" \
  "$COARSE2FINE_TIMESTAMP1_X" "$COARSE2FINE_TIMESTAMP1_Y" "$COARSE2FINE_TIMESTAMP1_Z")
PROBABILITY=()
[[ $WRITE_NIFTI != 1 || $(wc -w <<<"$COARSE2FINE_TESTING_ORGAN_ID") -lt 2 ]] || PROBABILITY=(--probability)  # to merge by

coarse2fine() {
  STAGE="coarse-to-fine testing of fold $fold, organ $organ"
  run_on "$COARSE2FINE_TESTING_GPU" OrganSegRSTN/coarse2fine_testing.py "${ARGUMENTS[@]}" "${COARSE2FINE[@]}" \
    "${PRECISE[@]}" ${STOP_DSC:+--stop_DSC "$STOP_DSC"} ${NIFTI[@]+"${NIFTI[@]}"} ${PROBABILITY[@]+"${PROBABILITY[@]}"}
}
merge_organs() {
  local fold
  for fold in $(folds); do
    STAGE="merging of fold $fold, organs $COARSE2FINE_TESTING_ORGAN_ID"
    data_arguments "$fold" "$COARSE2FINE_TESTING_ORGAN_ID"
    run OrganSegRSTN/merge_organs.py "${ARGUMENTS[@]}" "${COARSE2FINE[@]}"
  done
}
if stage "$ENABLE_COARSE2FINE_TESTING" 'coarse-to-fine testing'; then
  each "$COARSE2FINE_TESTING_ORGAN_ID" coarse2fine
  [[ -z ${PROBABILITY[*]-} ]] || merge_organs
fi
if stage "$ENABLE_REPORT" report; then
  run OrganSegRSTN/report.py "$DATA_PATH" --low_range "$LOW_RANGE" --high_range "$HIGH_RANGE" \
    ${REPORT_REFERENCE:+--reference "$REPORT_REFERENCE"}
fi

[[ $STAGE != set-up ]] || echo 'Nothing is turned on: edit the flags at the top of run.sh, or LAZY_MODE=1 bash run.sh'
