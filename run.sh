#!/usr/bin/env bash
# OrganSegRSTN, from raw scans to a report: edit the settings, or set them in the environment, and
# run it: bash run.sh. LAZY_MODE=1 runs every stage; DRY_RUN=1 prints the commands instead.
# Each stage stands below its settings, in the order of the pipeline. How to use it: docs/run_sh.md;
# every setting: docs/flags.md.
case ${BASH_VERSION:+$BASH} in '' | sh | */sh) echo 'run.sh needs bash: bash run.sh' >&2; exit 2 ;; esac
set -euo pipefail
HERE=${BASH_SOURCE[0]}
while [[ -L $HERE ]]; do  # run.sh may be run through a symbolic link
  link=$(readlink "$HERE")
  [[ $link == /* ]] || link=$(dirname "$HERE")/$link
  HERE=$link
done
HERE=$(CDPATH='' cd "$(dirname "$HERE")" && pwd)
# shellcheck source=plumbing.sh
source "$HERE/plumbing.sh"

#### What to run ###################################################################################
: "${LAZY_MODE:=0}"                     # 1: all of these stages, on all three planes
: "${DRY_RUN:=0}"                       # 1: print the commands, run nothing
: "${ENABLE_DICOM2NPY:=0}"              # DICOM series in RAW_PATH -> images/
: "${ENABLE_NII2NPY:=0}"                # NIfTI labels (and images) in RAW_PATH -> labels/ (and images/)
: "${ENABLE_INITIALIZATION:=0}"         # slices and lists; once for a data set
: "${ENABLE_CHECK_DATA:=$ENABLE_INITIALIZATION}"  # statistics and warnings; DATA_PATH/check_data.png shows every case
: "${ENABLE_PRETRAINING:=0}"            # an FCN-8s to start from; once for a fold
: "${ENABLE_TRAINING:=0}"
: "${ENABLE_COARSE_TESTING:=0}"
: "${ENABLE_COARSE_FUSION:=0}"
: "${ENABLE_ORACLE_TESTING:=0}"
: "${ENABLE_ORACLE_FUSION:=0}"
: "${ENABLE_COARSE2FINE_TESTING:=0}"
: "${ENABLE_REPORT:=0}"                 # DATA_PATH/report/index.html: figures and pictures of all results
: "${WRITE_NIFTI:=0}"                   # 1: write predictions as .nii.gz, too; merge those of several organs
: "${OVERWRITE:=0}"                     # 1: replace results made with other settings, and lists edited manually

#### On what #######################################################################################
: "${DATA_PATH:=$HERE/data}"            # images/, labels/, and all that is made of them
: "${RAW_PATH:=}"                       # raw scans to convert
: "${PYTHON:=}"                         # the python of your own environment; empty: .venv is made beside run.sh
: "${PRECISION:=fp32}"                  # tf32, bf16, fp16 (testing), auto: faster where the device has it (docs/speed.md)
: "${SEED:=}"                           # a whole number makes pretraining and training repeatable

# for convenience: the defaults of each stage below
: "${CURRENT_ORGAN_ID=1}"               # or several: "1 3 4"
: "${CURRENT_PLANE:=A}"                 # X, Y, Z, or A for all three
: "${CURRENT_FOLD:=0}"                  # or A for all folds
: "${CURRENT_GPU:=${CURRENT_FOLD/A/0}}" # number of a CUDA device, or cpu; several, a process each: 0,1
: "${PLANE_GPUS:=}"                     # "0 1 2": train and test X, Y and Z at once; "0 1": Z after X
: "${TORCHRUN_ARGS:=}"                  # several machines: arguments of torchrun instead of --standalone

#### DEMO SETTINGS #################################################################################
# for the built-in phantom, which lazy mode makes if DATA_PATH has no images and RAW_PATH is empty
DEMO=0
if is_demo; then
  DEMO=1
  [[ $LAZY_MODE != 1 ]] || RAW_PATH=$DATA_PATH/phantom
  PHANTOM_CASES=16
  : "${ORGAN_NUMBER:=8}"
  : "${RECIPE:=fast}"
  : "${PRETRAINING_WIDTH:=12}"          # the paper's network has 64: days on a CPU
  : "${PRETRAINING_EPOCHS:=3}"
  : "${PRETRAINING_LEARNING_RATE:=1e-3}"
  : "${LEARNING_RATE1:=1e-3}"           # a narrow network learns faster
  : "${LEARNING_RATE_M1:=1}"
  : "${TRAINING_EPOCH_S:=0}"            # both networks know the organ from pretraining
  : "${TRAINING_EPOCH_I:=1}"
  : "${TRAINING_EPOCH_J:=3}"
  : "${LR_DECAY_EPOCH_J_STEP:=1}"
  : "${TRAINING_MARGIN:=10}"            # of voxels of 3.3 mm
  : "${MAX_ROUNDS:=3}"
  : "${SEED:=0}"
  command -v nvidia-smi >/dev/null || : "${PLANE_GPUS:=cpu cpu}"  # X, then Z, beside Y, which has as many slices
  [[ -n ${OMP_NUM_THREADS:-} ]] || SHARE=2  # threads, on any machine: the result depends on their number
fi
#### END OF DEMO SETTINGS ##########################################################################

#### Conversion ####################################################################################
: "${LABEL_ORIENTATION:=auto}"          # how nii2npy.py turns a label onto its image: auto, affine or published
# dicom2npy.py, nii2npy.py: raw_path data_path
dicom2npy() { convert DATA2NPY/dicom2npy.py "$RAW_PATH" "$DATA_PATH"; }
nii2npy() { convert DATA2NPY/nii2npy.py "$RAW_PATH" "$DATA_PATH" --orientation "$LABEL_ORIENTATION"; }
phantom() { script DATA2NPY/make_phantom.py "$RAW_PATH" --cases "$PHANTOM_CASES"; }

#### Initialization ################################################################################
: "${ORGAN_NUMBER:=1}"                  # highest organ number in the labels
: "${FOLDS:=4}"
: "${LOW_RANGE:=-100}"                  # intensity window (HU)
: "${HIGH_RANGE:=240}"
# init.py: data_path organ_number folds low_range high_range
initialization() {
  script OrganSegRSTN/init.py "$DATA_PATH" "$ORGAN_NUMBER" "$FOLDS" "$LOW_RANGE" "$HIGH_RANGE" \
    ${LAZILY:+--if_changed} ${OVERWRITE:+--overwrite}
}
# check_data.py: data_path organ_number low_range high_range
check_data() { script OrganSegRSTN/check_data.py "$DATA_PATH" "$ORGAN_NUMBER" "$LOW_RANGE" "$HIGH_RANGE"; }

#### Pretraining: organs, GPU and margin are those of the training below ###########################
: "${RECIPE:=published}"                # of the training; fast: better masks in less time (docs/training.md)
: "${SLICE_THRESHOLD:=0.98}"            # share of the slices with the organ to train on; above 1: least pixels
: "${SLICE_THICKNESS:=3}"               # 1 or 3
: "${PRETRAINING_EPOCHS:=10}"
: "${PRETRAINING_WIDTH:=64}"            # channels of the first layer; 64 in the paper
: "${PRETRAINING_LEARNING_RATE:=2e-4}"
: "${PRETRAINED:=}"                     # convert weights instead: vgg16 (downloaded), or a file
: "${PRETRAINED_FURTHER:=0}"            # 1: then train them on the fold's slices, and start from that
DATA=("$ORGAN_NUMBER" "$LOW_RANGE" "$HIGH_RANGE" "$SLICE_THRESHOLD" "$SLICE_THICKNESS")
# pretrain.py: data_path current_fold organ_number low_range high_range slice_threshold
#   slice_thickness organ_ID GPU_ID epochs
pretraining() {
  local gpu=${PLANE_GPUS:-$TRAINING_GPU}
  local pretrain=(OrganSegRSTN/pretrain.py "$DATA_PATH" "$fold" "${DATA[@]}" "$organ" "${gpu%%[ ,]*}" "$PRETRAINING_EPOCHS")
  local settings="width $PRETRAINING_WIDTH, epochs $PRETRAINING_EPOCHS, rate $PRETRAINING_LEARNING_RATE, window $LOW_RANGE $HIGH_RANGE,"
  settings+=" slices $SLICE_THRESHOLD $SLICE_THICKNESS, margin $TRAINING_MARGIN, seed ${SEED:-none}, from ${PRETRAINED:-nothing}"
  local record=$DATA_PATH/models/pretrained/fcn8s_FD${fold}_$organ.txt
  # a file is converted anew: what is there may be of another
  if [[ -n $LAZILY && ( -z $PRETRAINED || $PRETRAINED == vgg16 || $PRETRAINED_FURTHER == 1 ) ]] && pretrained; then
    made_with "$settings" "$record"
    echo "fold $fold, organ $organ: models/pretrained holds an FCN-8s to start from"
    return
  fi
  if converting; then
    script "${pretrain[@]}" --convert "$PRETRAINED"
  else
    script "${pretrain[@]}" --width "$PRETRAINING_WIDTH" --learning_rate "$PRETRAINING_LEARNING_RATE" \
      --crop_margin "$TRAINING_MARGIN" --resume --precision "$PRECISION" ${SEED:+--seed "$SEED"} \
      ${PRETRAINED:+--convert "$PRETRAINED" --further}
    [[ $DRY_RUN == 1 ]] || echo "$settings" >"$record"
    [[ $RECIPE == fast ]] || echo '# RECIPE=fast trains better masks in less time from this start (docs/training.md)'
  fi
}

#### Training in modes S, I and J: TRAINING_TIMESTAMP=... of a stopped training resumes it ##########
: "${TRAINING_ORGAN_ID=$CURRENT_ORGAN_ID}"
: "${TRAINING_PLANE:=$CURRENT_PLANE}"
: "${TRAINING_GPU:=$CURRENT_GPU}"
if [[ $RECIPE == fast ]]; then
  : "${LEARNING_RATE1:=5e-4}"
  : "${LEARNING_RATE_M1:=1}"
fi
: "${LEARNING_RATE1:=1e-5}"             # coarse layers; RECIPE=fast: 5e-4
: "${LEARNING_RATE_M1:=10}"             # times LEARNING_RATE1: saliency and fine layers; RECIPE=fast: 1
: "${LEARNING_RATE2:=1e-5}"             # coarse layers in J with JOINT_FROM; else not used
: "${LEARNING_RATE_M2:=10}"
: "${TRAINING_MARGIN:=20}"              # pixels around the organ's box
: "${TRAINING_PROB:=0.5}"               # probability of a random margin
: "${TRAINING_SAMPLE_BATCH:=1}"         # draws whose mean is a random margin
: "${TRAINING_EPOCH_S:=2}"
: "${TRAINING_EPOCH_I:=6}"
: "${TRAINING_EPOCH_J:=8}"
: "${LR_DECAY_EPOCH_J_STEP:=2}"         # epochs in J after which the rates halve
: "${FINE_ITERATIONS:=1}"               # the paper's T: fine steps a sample in I and J
: "${TRAINING_PRETRAINED:=}"            # FCN-8s or RSTN snapshot to start from; empty: by models/pretrained/
: "${JOINT_FROM:=}"                     # train J only, from the snapshot of I with this timestamp (_ for none)
: "${SNAPSHOT_STEPS:=}"                 # save a snapshot every so many steps of J, too
OWN_TIMESTAMP=${TRAINING_TIMESTAMP:-}
if [[ $ENABLE_TRAINING == 1 || $LAZY_MODE == 1 ]]; then
  : "${TRAINING_TIMESTAMP:=$(date +%Y%m%d_%H%M%S)}"
else
  : "${TRAINING_TIMESTAMP:=_}"          # training: the time; else _: the snapshot without a timestamp, or the newest
fi

# of the published run.sh, accepted and not used (the epochs that it repeats for each test,
# COARSE_TESTING_EPOCH_S ..., must be those of the training)
: "${COARSE_TIMESTAMP2:=_}" "${COARSE_TIMESTAMP2_X:=_}" "${COARSE_TIMESTAMP2_Y:=_}" "${COARSE_TIMESTAMP2_Z:=_}"
: "${ORACLE_TIMESTAMP2:=_}" "${ORACLE_TIMESTAMP2_X:=_}" "${ORACLE_TIMESTAMP2_Y:=_}" "${ORACLE_TIMESTAMP2_Z:=_}"
: "${COARSE2FINE_TIMESTAMP2_X:=_}" "${COARSE2FINE_TIMESTAMP2_Y:=_}" "${COARSE2FINE_TIMESTAMP2_Z:=_}"

RATES=("$LEARNING_RATE1" "$LEARNING_RATE_M1" "$LEARNING_RATE2" "$LEARNING_RATE_M2" "$TRAINING_MARGIN")
SAMPLING=("$TRAINING_PROB" "$TRAINING_SAMPLE_BATCH")
EPOCHS=("$TRAINING_EPOCH_S" "$TRAINING_EPOCH_I" "$TRAINING_EPOCH_J" "$LR_DECAY_EPOCH_J_STEP")
# training.py: data_path current_fold organ_number low_range high_range slice_threshold
#   slice_thickness organ_ID plane GPU_ID learning_rate1 learning_rate_m1 learning_rate2
#   learning_rate_m2 crop_margin crop_prob crop_sample_batch epoch_S epoch_I epoch_J lr_decay_epoch
#   timestamp
training() {
  local script=training.py start=$TRAINING_PRETRAINED
  if [[ -z $start && $PRETRAINED_FURTHER == 1 ]]; then
    start=$DATA_PATH/models/pretrained/fcn8s_FD${fold}_$organ.pth
  elif [[ -z $start$JOINT_FROM ]] && converting; then
    start=$(converted_start)
  fi
  one_process "$gpu" || script=training_parallel.py
  script_on "$gpu" "OrganSegRSTN/$script" "$DATA_PATH" "$fold" "${DATA[@]}" "$organ" "$plane" "$gpu" \
    "${RATES[@]}" "${SAMPLING[@]}" "${EPOCHS[@]}" "$TRAINING_TIMESTAMP" \
    --recipe "$RECIPE" --resume --fine_iterations "$FINE_ITERATIONS" --precision "$PRECISION" \
    ${SEED:+--seed "$SEED"} ${start:+--pretrained "$start"} \
    ${JOINT_FROM:+--joint_from "$JOINT_FROM"} ${SNAPSHOT_STEPS:+--snapshot_steps "$SNAPSHOT_STEPS"}
}

#### Coarse testing ################################################################################
: "${COARSE_TESTING_ORGAN_ID=$CURRENT_ORGAN_ID}"
: "${COARSE_TESTING_PLANE:=$CURRENT_PLANE}"
: "${COARSE_TESTING_GPU:=$CURRENT_GPU}"
: "${COARSE_TIMESTAMP1:=$TRAINING_TIMESTAMP}"  # of the training to test
: "${AVERAGE:=1}"                       # test the mean of the last so many snapshots, also below
# coarse_testing.py: data_path current_fold organ_number low_range high_range slice_threshold
#   slice_thickness organ_ID plane GPU_ID learning_rate1 learning_rate_m1 learning_rate2
#   learning_rate_m2 crop_margin crop_prob crop_sample_batch epoch_S epoch_I epoch_J epoch_step
#   timestamp1 [timestamp2]
testing() {  # STEP TIMESTAMP1 TIMESTAMP2: test one plane, coarse or oracle
  script_on "$gpu" "OrganSegRSTN/$1_testing.py" "$DATA_PATH" "$fold" "${DATA[@]}" "$organ" "$plane" "$gpu" \
    "${RATES[@]}" "${SAMPLING[@]}" "${EPOCHS[@]}" "${@:2}" \
    --recipe "$RECIPE" --average "$AVERAGE" --precision "$PRECISION" ${WRITE_NIFTI:+--nifti} ${OVERWRITE:+--overwrite}
}
coarse_testing() {
  testing coarse "$COARSE_TIMESTAMP1" "$COARSE_TIMESTAMP2"
}

#### Coarse fusion #################################################################################
: "${COARSE_FUSION_ORGAN_ID=$CURRENT_ORGAN_ID}"
: "${COARSE_FUSION_THRESHOLD:=0.5}"
: "${COARSE_TIMESTAMP1_X:=$COARSE_TIMESTAMP1}"
: "${COARSE_TIMESTAMP1_Y:=$COARSE_TIMESTAMP1}"
: "${COARSE_TIMESTAMP1_Z:=$COARSE_TIMESTAMP1}"
# coarse_fusion.py: data_path current_fold organ_number low_range high_range slice_threshold
#   slice_thickness organ_ID GPU_ID learning_rate1 learning_rate_m1 learning_rate2 learning_rate_m2
#   crop_margin epoch_S epoch_I epoch_J epoch_step threshold timestamp1_X timestamp1_Y timestamp1_Z
#   [timestamp2_X timestamp2_Y timestamp2_Z]
fusion() {  # STEP THRESHOLD TIMESTAMPS...: fuse the planes' volumes of coarse or oracle testing
  script "OrganSegRSTN/$1_fusion.py" "$DATA_PATH" "$fold" "${DATA[@]}" "$organ" "$CURRENT_GPU" \
    "${RATES[@]}" "${EPOCHS[@]}" "${@:2}" \
    --recipe "$RECIPE" ${WRITE_NIFTI:+--nifti} ${OVERWRITE:+--overwrite}
}
coarse_fusion() {
  fusion coarse "$COARSE_FUSION_THRESHOLD" \
    "$COARSE_TIMESTAMP1_X" "$COARSE_TIMESTAMP1_Y" "$COARSE_TIMESTAMP1_Z"
}

#### Oracle testing ################################################################################
: "${ORACLE_TESTING_ORGAN_ID=$CURRENT_ORGAN_ID}"
: "${ORACLE_TESTING_PLANE:=$CURRENT_PLANE}"
: "${ORACLE_TESTING_GPU:=$CURRENT_GPU}"
: "${ORACLE_TIMESTAMP1:=$TRAINING_TIMESTAMP}"
# oracle_testing.py: as coarse_testing.py
oracle_testing() {
  testing oracle "$ORACLE_TIMESTAMP1" "$ORACLE_TIMESTAMP2"
}

#### Oracle fusion #################################################################################
: "${ORACLE_FUSION_ORGAN_ID=$CURRENT_ORGAN_ID}"
: "${ORACLE_FUSION_THRESHOLD:=0.5}"
: "${ORACLE_TIMESTAMP1_X:=$ORACLE_TIMESTAMP1}"
: "${ORACLE_TIMESTAMP1_Y:=$ORACLE_TIMESTAMP1}"
: "${ORACLE_TIMESTAMP1_Z:=$ORACLE_TIMESTAMP1}"
# oracle_fusion.py: as coarse_fusion.py
oracle_fusion() {
  fusion oracle "$ORACLE_FUSION_THRESHOLD" \
    "$ORACLE_TIMESTAMP1_X" "$ORACLE_TIMESTAMP1_Y" "$ORACLE_TIMESTAMP1_Z"
}

#### Coarse-to-fine testing ########################################################################
: "${COARSE2FINE_TESTING_ORGAN_ID=$CURRENT_ORGAN_ID}"
: "${COARSE2FINE_TESTING_GPU:=${PLANE_GPUS%% *}}"  # three planes in one process
: "${COARSE2FINE_TESTING_GPU:=$CURRENT_GPU}"
: "${FINE_FUSION_THRESHOLD:=0.5}"       # probability from which a voxel is organ
: "${MAX_ROUNDS:=10}"
: "${STOP_DSC:=}"                       # end a case where two rounds agree so (0.99); empty: all rounds, as published
: "${COARSE2FINE_TIMESTAMP1_X:=$TRAINING_TIMESTAMP}"
: "${COARSE2FINE_TIMESTAMP1_Y:=$TRAINING_TIMESTAMP}"
: "${COARSE2FINE_TIMESTAMP1_Z:=$TRAINING_TIMESTAMP}"
COARSE2FINE=("$COARSE2FINE_TESTING_GPU" "${RATES[@]}" "${EPOCHS[@]}"
  "$COARSE_FUSION_THRESHOLD" "$FINE_FUSION_THRESHOLD" "$MAX_ROUNDS"
  "$COARSE2FINE_TIMESTAMP1_X" "$COARSE2FINE_TIMESTAMP1_Y" "$COARSE2FINE_TIMESTAMP1_Z")
MERGE=
[[ $WRITE_NIFTI != 1 || ! $COARSE2FINE_TESTING_ORGAN_ID =~ [0-9][[:space:]]+[0-9] ]] || MERGE=1
# coarse2fine_testing.py: data_path current_fold organ_number low_range high_range slice_threshold
#   slice_thickness organ_ID GPU_ID learning_rate1 learning_rate_m1 learning_rate2 learning_rate_m2
#   crop_margin epoch_S epoch_I epoch_J epoch_step coarse_threshold fine_threshold max_rounds
#   timestamp1_X timestamp1_Y timestamp1_Z [timestamp2_X timestamp2_Y timestamp2_Z]
coarse2fine_testing() {
  script_on "$COARSE2FINE_TESTING_GPU" OrganSegRSTN/coarse2fine_testing.py "$DATA_PATH" "$fold" "${DATA[@]}" "$organ" \
    "${COARSE2FINE[@]}" --recipe "$RECIPE" --average "$AVERAGE" --precision "$PRECISION" ${STOP_DSC:+--stop_DSC "$STOP_DSC"} \
    ${WRITE_NIFTI:+--nifti} ${MERGE:+--probability} ${OVERWRITE:+--overwrite}
}
# merge_organs.py: as coarse2fine_testing.py, but all organs in the place of organ_ID
merge_organs() {
  script OrganSegRSTN/merge_organs.py "$DATA_PATH" "$fold" "${DATA[@]}" "$COARSE2FINE_TESTING_ORGAN_ID" \
    "${COARSE2FINE[@]}" --recipe "$RECIPE" ${OVERWRITE:+--overwrite}
}

#### Report ########################################################################################
: "${REPORT_REFERENCE:=}"               # a JSON file of figures to show beside ours
# report.py: data_path
report() {
  script OrganSegRSTN/report.py "$DATA_PATH" --low_range "$LOW_RANGE" --high_range "$HIGH_RANGE" \
    ${REPORT_REFERENCE:+--reference "$REPORT_REFERENCE"}
}

#### The pipeline: nothing to edit below ###########################################################
prepare  # checks every setting, and PYTHON
if [[ -n $RAW_PATH ]]; then
  [[ $DEMO == 0 ]] || stage 0 'making the phantom' once phantom
  if [[ $ENABLE_DICOM2NPY == 1 ]] || ! nifti_images; then
    stage "$ENABLE_DICOM2NPY" 'conversion (dicom2npy.py)' once dicom2npy
  fi
  stage "$ENABLE_NII2NPY" 'conversion (nii2npy.py)' once nii2npy
fi
stage "$ENABLE_INITIALIZATION" initialization once initialization
stage "$ENABLE_CHECK_DATA" 'a look at the data' once check_data
stage "$ENABLE_PRETRAINING" pretraining each_organ "$TRAINING_ORGAN_ID" pretraining
stage "$ENABLE_TRAINING" training \
  each_plane "$TRAINING_ORGAN_ID" "$TRAINING_PLANE" "$TRAINING_GPU" training
stage "$ENABLE_COARSE_TESTING" 'coarse testing' \
  each_plane "$COARSE_TESTING_ORGAN_ID" "$COARSE_TESTING_PLANE" "$COARSE_TESTING_GPU" coarse_testing
stage "$ENABLE_COARSE_FUSION" 'coarse fusion' \
  each_organ "$COARSE_FUSION_ORGAN_ID" coarse_fusion
stage "$ENABLE_ORACLE_TESTING" 'oracle testing' \
  each_plane "$ORACLE_TESTING_ORGAN_ID" "$ORACLE_TESTING_PLANE" "$ORACLE_TESTING_GPU" oracle_testing
stage "$ENABLE_ORACLE_FUSION" 'oracle fusion' \
  each_organ "$ORACLE_FUSION_ORGAN_ID" oracle_fusion
stage "$ENABLE_COARSE2FINE_TESTING" 'coarse-to-fine testing' \
  each_organ "$COARSE2FINE_TESTING_ORGAN_ID" coarse2fine_testing
[[ -z $MERGE ]] || stage "$ENABLE_COARSE2FINE_TESTING" merging each_fold merge_organs
stage "$ENABLE_REPORT" report once report
if [[ $STAGE == set-up ]]; then
  echo 'Nothing is turned on: edit the switches at the top of run.sh, or LAZY_MODE=1 bash run.sh'
fi
