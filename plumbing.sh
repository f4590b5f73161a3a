# Sourced by run.sh: checks settings, starts stages (also planes side by side), handles signals.

exists() { [[ -e $1 ]]; }  # exists FOLDER/*: does anything match? Quote FOLDER.
nifti_images() (  # are there images that nii2npy.py reads? The endings are those of scans/dataset.py
  shopt -s nocaseglob nullglob
  set -- "$RAW_PATH"/images{,Tr}/*.{nii,nii.gz,nrrd,mha,mhd}
  [[ $# != 0 ]]
)

is_demo() {  # does DATA_PATH hold the phantom, or will it?
  [[ -z $RAW_PATH ]] &&
    { [[ -e $DATA_PATH/phantom ]] || { [[ $LAZY_MODE == 1 ]] && ! exists "$DATA_PATH"/images/*.npy; }; }
}

#### Settings: each is checked before the first stage starts #######################################
refuse() {  # refuse MESSAGE: end with one line and exit code 2
  local newline=$'\n'
  echo "run.sh: ${*//$newline/ }" >&2
  exit 2
}

matching() {  # matching REGEX MEANING NAME ...: refuse a setting that does not match
  local regex="^($1)\$" name
  for name in "${@:3}"; do
    [[ ${!name} =~ $regex ]] || refuse "$name is '${!name}', not $2"
  done
}

calculate() { LC_ALL=C awk "BEGIN { exit !($1) }"; }  # calculate CONDITION: of numbers, which may be fractions

numbers() {  # numbers REGEX MEANING LEAST MOST NAME ...: refuse a setting outside LEAST to MOST; - is no limit
  local meaning="$2 from $3 to $4" name
  [[ $4 != - ]] || meaning="$2 of at least $3"
  [[ $3 != - ]] || meaning=$2
  for name in "${@:5}"; do
    matching "$1" "$meaning" "$name"
    if [[ $3 != - ]] && calculate "${!name} < $3" || { [[ $4 != - ]] && calculate "${!name} > $4"; }; then
      refuse "$name is '${!name}', not $meaning"
    fi
  done
}
whole() { numbers '[0-9]{1,9}' 'a whole number' "$@"; }
number() { numbers '-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,2})?' 'a number' "$@"; }
rates() {  # rates NAME ...: refuse a setting that is not a positive number
  local name
  number - - "$@"
  for name in "$@"; do
    calculate "${!name} > 0" || refuse "$name is '${!name}', not above 0"
  done
}

organs() {  # organs NAME ...: refuse a list that is empty, or names an organ twice or one above ORGAN_NUMBER
  local name organ seen
  matching '[0-9[:space:]]*[0-9][0-9[:space:]]*' 'a list of organs, such as "1 3"' "$@"
  for name in "$@"; do
    seen=' '
    for organ in ${!name}; do
      calculate "$organ >= 1 && $organ <= $ORGAN_NUMBER" ||
        refuse "$name is '${!name}', but the organs are 1 to $ORGAN_NUMBER (ORGAN_NUMBER)"
      [[ $seen != *" $organ "* ]] || refuse "$name is '${!name}', which names organ $organ twice"
      seen="$seen$organ "
    done
  done
}

epochs_elsewhere() {  # the published run.sh repeats the epochs for each stage: they must agree with the training's
  local stage name training
  for stage in COARSE_TESTING COARSE_FUSION ORACLE_TESTING ORACLE_FUSION FINE_TESTING; do
    for name in S I J STEP; do
      training=TRAINING_EPOCH_$name
      [[ $name != STEP ]] || training=LR_DECAY_EPOCH_J_STEP
      name=${stage}_EPOCH_$name
      [[ -z ${!name:-} || ${!name} == "${!training}" ]] ||
        refuse "$name is '${!name}', but $training is '${!training}': name the epochs there only"
    done
  done
}

misspelled() {  # warn of names in the environment that look like settings and are none
  local name
  for name in $(compgen -e | grep -E '^(ENABLE|LAZY|CURRENT_(ORGAN|PLANE|FOLD|GPU)|(PRE)?TRAIN|COARSE|FINE|LEARNING_RATE|SLICE|ORACLE_[TF])'); do
    [[ $name == *_EPOCH_[SIJ] || $name == *_EPOCH_STEP ]] || grep -qE "\{$name:?=" "$HERE/run.sh" ||
      echo "warning: $name is set, but run.sh has no such setting: see docs/flags.md" >&2
  done
}

check_settings() {
  misspelled
  local gpu='(cpu|[0-9]+)(,(cpu|[0-9]+))*' stamp='[^/[:cntrl:]]{15}|_' stamped='20261123_000000, with 15 characters, or _ for none'
  matching '[01]' '0 or 1' LAZY_MODE DRY_RUN WRITE_NIFTI OVERWRITE \
    ENABLE_{DICOM2NPY,NII2NPY,INITIALIZATION,CHECK_DATA,PRETRAINING,TRAINING} \
    ENABLE_{COARSE_TESTING,COARSE_FUSION,ORACLE_TESTING,ORACLE_FUSION,COARSE2FINE_TESTING,REPORT}
  [[ ! -e $DATA_PATH || -d $DATA_PATH ]] || refuse "DATA_PATH is '$DATA_PATH', which is not a folder"
  [[ $DEMO == 1 || -z $RAW_PATH || ! -e $DATA_PATH/phantom ]] ||
    refuse "$DATA_PATH is the demo's folder: name another DATA_PATH for scans of your own"
  [[ -n $RAW_PATH || $ENABLE_DICOM2NPY$ENABLE_NII2NPY == 00 ]] ||
    refuse 'RAW_PATH is empty: name the folder of the raw scans'
  [[ $DEMO == 1 || -d $RAW_PATH || $LAZY_MODE$ENABLE_DICOM2NPY$ENABLE_NII2NPY == 000 || -z $RAW_PATH ]] ||
    refuse "RAW_PATH is '$RAW_PATH': no such folder"
  whole 1 255 ORGAN_NUMBER
  whole 1 - FOLDS
  [[ $CURRENT_FOLD == A ]] || whole 0 "$((10#$FOLDS - 1))" CURRENT_FOLD
  [[ $CURRENT_FOLD != A || $LAZY_MODE$ENABLE_INITIALIZATION != 00 || ! -e $DATA_PATH/lists/training_FD$((10#$FOLDS)).txt ||
     $ENABLE_PRETRAINING$ENABLE_TRAINING$ENABLE_COARSE_TESTING$ENABLE_COARSE_FUSION == 0000 &&
     $ENABLE_ORACLE_TESTING$ENABLE_ORACLE_FUSION$ENABLE_COARSE2FINE_TESTING == 000 ]] ||
    refuse "FOLDS is $FOLDS, but $DATA_PATH/lists holds more folds, which CURRENT_FOLD=A would leave out; set FOLDS," \
      'or remove lists that are no longer used'
  matching '[XYZA]' 'X, Y, Z or A' {CURRENT,TRAINING,COARSE_TESTING,ORACLE_TESTING}_PLANE
  organs {CURRENT,TRAINING}_ORGAN_ID {COARSE,ORACLE}_{TESTING,FUSION}_ORGAN_ID COARSE2FINE_TESTING_ORGAN_ID
  [[ -z $PLANE_GPUS ]] ||
    matching "$gpu( +$gpu){1,2}" 'one for each of X, Y and Z, or two' PLANE_GPUS
  matching "$gpu" 'the number of a GPU, or cpu, or several such as 0,1' \
    {CURRENT,TRAINING,COARSE_TESTING,ORACLE_TESTING,COARSE2FINE_TESTING}_GPU
  matching 'fp32|tf32|bf16|fp16|auto' 'fp32, tf32, bf16, fp16 or auto' PRECISION
  [[ $PRECISION != fp16 || $LAZY_MODE$ENABLE_PRETRAINING$ENABLE_TRAINING == 000 ]] ||
    refuse 'PRECISION is fp16, which is for testing only: train in fp32, tf32 or bf16'
  matching 'published|fast' 'published or fast' RECIPE
  matching '[01]' '0 or 1' PRETRAINED_FURTHER
  [[ $PRETRAINED == '' || $PRETRAINED == vgg16 || -f $PRETRAINED ]] || refuse "PRETRAINED is '$PRETRAINED': not vgg16, and no such file"
  [[ $PRETRAINED_FURTHER == 0 || -n $PRETRAINED || $LAZY_MODE$ENABLE_PRETRAINING == 00 ]] ||
    refuse 'PRETRAINED_FURTHER is 1, but PRETRAINED is empty: name the weights to train further'
  [[ -z $PRETRAINED || $DEMO == 1 || $PRETRAINING_WIDTH == 64 ]] ||
    refuse "PRETRAINING_WIDTH is $PRETRAINING_WIDTH, but the weights of PRETRAINED are of width 64"
  [[ -z $TRAINING_PRETRAINED || -f $TRAINING_PRETRAINED ]] || refuse "TRAINING_PRETRAINED is '$TRAINING_PRETRAINED': no such file"
  whole 1 - AVERAGE
  [[ -z $SNAPSHOT_STEPS ]] || whole 1 - SNAPSHOT_STEPS
  [[ -z $JOINT_FROM ]] || matching "$stamp" "$stamped" JOINT_FROM
  matching '[0-9]{0,19}' 'a whole number' SEED
  matching 'auto|affine|published' 'auto, affine or published' LABEL_ORIENTATION
  number - - LOW_RANGE HIGH_RANGE
  calculate "$LOW_RANGE < $HIGH_RANGE" || refuse "LOW_RANGE is $LOW_RANGE, not below HIGH_RANGE, $HIGH_RANGE"
  number 0 - SLICE_THRESHOLD
  matching '1|3' '1 or 3' SLICE_THICKNESS
  whole 1 - PRETRAINING_EPOCHS TRAINING_SAMPLE_BATCH LR_DECAY_EPOCH_J_STEP FINE_ITERATIONS
  whole 3 - PRETRAINING_WIDTH
  rates PRETRAINING_LEARNING_RATE LEARNING_RATE{1,_M1,2,_M2}
  whole 0 - TRAINING_MARGIN TRAINING_EPOCH_{S,I,J} MAX_ROUNDS
  number 0 1 TRAINING_PROB {COARSE,ORACLE,FINE}_FUSION_THRESHOLD
  [[ -z $STOP_DSC ]] || number 0 1 STOP_DSC
  matching "$stamp" "$stamped" TRAINING_TIMESTAMP \
    {COARSE,ORACLE}_TIMESTAMP1 {COARSE,ORACLE,COARSE2FINE}_TIMESTAMP1_{X,Y,Z}
  [[ -z $REPORT_REFERENCE || -f $REPORT_REFERENCE ]] || refuse "REPORT_REFERENCE is '$REPORT_REFERENCE': no such file"
  epochs_elsewhere
  [[ $((10#$FOLDS)) != 1 || $LAZY_MODE$ENABLE_PRETRAINING$ENABLE_TRAINING == 000 ]] ||
    refuse 'FOLDS is 1, which leaves no case to train on: at least 2'
}

pretrained() {  # does models/pretrained hold an FCN-8s for $fold and $organ?
  if converting; then
    exists "$(converted_start)"
  else
    exists "$DATA_PATH/models/pretrained/fcn8s_FD${fold}_$organ.pth" || from_outside
  fi
}
converting() {  # are the weights of PRETRAINED to start from, only converted?
  [[ -n $PRETRAINED && $PRETRAINED_FURTHER != 1 ]]
}
converted_start() {  # the file that PRETRAINED is converted to
  local kind=caffe
  if [[ $PRETRAINED == vgg16 ]] || grep -qaF features.0.weight "$PRETRAINED"; then kind=vgg16; fi
  echo "$DATA_PATH/models/pretrained/fcn8s_from_$kind.pth"
}
from_outside() {  # does models/pretrained hold weights from outside to start from?
  local folder=$DATA_PATH/models/pretrained
  [[ $PRETRAINED_FURTHER != 1 ]] &&
    { exists "$folder/fcn8s_from_caffe.pth" || exists "$folder/fcn8s_from_vgg16.pth"; }
}
made_with() {  # made_with SETTINGS RECORD: refuse to start from an FCN-8s of pretrain.py that was made with others
  local made=${2%.txt}.pth
  [[ -z $TRAINING_PRETRAINED$JOINT_FROM ]] || return 0
  if from_outside; then
    [[ $DEMO == 1 || $PRETRAINING_WIDTH == 64 ]] || refuse "PRETRAINING_WIDTH is $PRETRAINING_WIDTH, but training would start from the" \
      "converted weights in models/pretrained, of width 64; move them away"
    return
  fi
  [[ ! -e $made || ! -e $2 || $2 -ot $made || $(<"$2") == "$1" ]] ||
    refuse "$made was made with $(<"$2"), not $1; ENABLE_PRETRAINING=1 makes a new start"
}

check_start() {  # a training must not start from converted weights beside those that this run pretrains
  local file
  [[ $ENABLE_PRETRAINING == 1 && -z $PRETRAINED$TRAINING_PRETRAINED ]] || return 0
  for file in "$DATA_PATH"/models/pretrained/fcn8s_from_{caffe,vgg16}.pth; do
    [[ ! -e $file ]] || refuse "$file: training would start from it, not from what this run pretrains; move it away"
  done
}

check_pretrained() {  # a later fold must not fail after days because it has no FCN-8s to start from
  local fold organ stamp=_$TRAINING_TIMESTAMP
  [[ ${#TRAINING_TIMESTAMP} == 15 ]] || stamp=
  [[ $ENABLE_TRAINING$ENABLE_PRETRAINING$LAZY_MODE$DRY_RUN == 1000 && -z $TRAINING_PRETRAINED$JOINT_FROM ]] || return 0
  for fold in $(folds); do
    for organ in $TRAINING_ORGAN_ID; do
      pretrained || exists "$DATA_PATH"/models/snapshots/*/FD"$fold:"?"${SLICE_THICKNESS}_$organ$stamp.ckpt" ||
        refuse "fold $fold, organ $organ: no FCN-8s to start from in models/pretrained${PRETRAINED:+, made of $PRETRAINED};" \
          "ENABLE_PRETRAINING=1 makes one"
    done
  done
}

prepare() {  # check every setting, set up PYTHON
  trap 'stop INT 130' INT
  trap 'stop TERM 143' TERM
  trap 'stop TERM 129' HUP  # the terminal is gone
  check_settings
  [[ $DATA_PATH == /* ]] || DATA_PATH=$PWD/$DATA_PATH  # a name that begins with - is no option
  [[ -z $RAW_PATH || $RAW_PATH == /* ]] || RAW_PATH=$PWD/$RAW_PATH
  [[ $WRITE_NIFTI == 1 ]] || WRITE_NIFTI=  # ${WRITE_NIFTI:+--nifti} is empty where it is off
  [[ $OVERWRITE == 1 ]] || OVERWRITE=
  check_start
  check_pretrained
  if [[ $DRY_RUN == 1 ]]; then
    : "${PYTHON:=python}"
  else
    # shellcheck source=setup.sh
    source "$HERE/setup.sh"
  fi
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # waiting threads sleep: spinning ones slow down other processes
  trap ended EXIT
  [[ $DEMO == 0 ]] || echo "#### DEMO SETTINGS apply: $DATA_PATH is the phantom's"
}

#### Stages ########################################################################################
STAGE=set-up  # what runs, for messages
LAZILY=  # 1: it runs because of LAZY_MODE only

stage() {  # stage SWITCH TITLE COMMAND ...: run COMMAND if the switch is on, or in lazy mode
  [[ $1 == 1 || $LAZY_MODE == 1 ]] || return 0
  LAZILY=
  [[ $1 == 1 ]] || LAZILY=1
  STAGE=$2
  echo "#### $STAGE"
  "${@:3}"
}

folds() {  # the folds that a number or A stands for
  if [[ $CURRENT_FOLD == A ]]; then seq 0 "$((10#$FOLDS - 1))"; else echo "$CURRENT_FOLD"; fi
}

planes() {  # planes PLANE: the planes that X, Y, Z or A stands for
  if [[ $LAZY_MODE == 1 || $1 == A ]]; then echo X Y Z; else echo "$1"; fi
}

plane_gpu() {  # plane_gpu PLANE: its GPU in PLANE_GPUS; of two, Z has that of X
  local X Y Z
  read -r X Y Z <<<"$PLANE_GPUS"
  case $1 in X) echo "$X" ;; Y) echo "$Y" ;; Z) echo "${Z:-$X}" ;; esac
}

once() {  # once COMMAND ...: run it as a job
  start "$@"
  finish "$JOB"
}

each_fold() {  # each_fold COMMAND ...: once for each $fold
  local title=$STAGE fold
  for fold in $(folds); do
    STAGE="$title of fold $fold"
    once "$@"
  done
}

over_organs() {  # over_organs "ORGANS" COMMAND ...: COMMAND for each $fold and $organ
  local title=$STAGE fold organ
  for fold in $(folds); do
    for organ in $1; do
      STAGE="$title of fold $fold, organ $organ"
      "${@:2}"
    done
  done
}
each_organ() { over_organs "$1" once "${@:2}"; }  # each_organ "ORGANS" COMMAND ...
each_plane() { over_organs "$1" on_planes "${@:2}"; }  # each_plane "ORGANS" PLANES GPU COMMAND ...

on_planes() {  # on_planes PLANES GPU COMMAND ...: COMMAND for each $plane on $gpu; at once on PLANE_GPUS
  local title=$STAGE planes plane gpu=$2 gpus X='' Y='' Z='' failed='' status=0
  planes=$(planes "$1")
  gpus=$(($(wc -w <<<"$PLANE_GPUS")))
  for plane in $planes; do
    [[ $plane$gpus != Z2 ]] || end_plane X
    STAGE="$title, plane $plane"
    if [[ -z $PLANE_GPUS ]]; then
      once "${@:3}"
    else
      gpu=$(plane_gpu "$plane")
      start beside "$plane" "$planes" "${@:3}"
      printf -v "$plane" %s "$JOB"
    fi
  done
  STAGE=$title
  for plane in X Y Z; do end_plane "$plane"; done
  [[ -z $failed ]] || STAGE="$title, plane$failed"
  return $status
}

end_plane() {  # end_plane PLANE: wait for its job, if there is one, for on_planes
  finish "${!1}" || { status=$?; failed="$failed $1"; }
  printf -v "$1" %s ''
}

beside() {  # beside PLANE PLANES COMMAND ...: COMMAND among the others, its lines marked with the plane
  local status=0 among
  among=$(($(wc -w <<<"$2")))
  share_cores "$((among < gpus ? among : gpus))"
  if [[ $DRY_RUN == 1 ]]; then
    "${@:3}"
  else
    { "${@:3}" 2>&1 | last mark "$1:"; } || status=$?
    [[ $status == 0 ]] || echo "run.sh: $STAGE failed (exit code $status)" >&2
    return $status
  fi
}

mark() {  # mark WORD: put it before every line
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '%s %s\n' "$1" "$line"; done
}

last() {  # last COMMAND ...: the end of a pipe, which must read on whatever signals come
  trap '' INT TERM HUP
  "$@"
}

convert() {  # convert SCRIPT RAW_PATH DATA_PATH OPTION ...: in lazy mode only if something has changed
  local record command="$1 $2${4:+ ${*:4}}" status=0  # without DATA_PATH, which may be moved
  record=$DATA_PATH/.$(basename "$1").txt
  if [[ $DRY_RUN == 1 ]]; then
    script "$@"
  elif [[ -n $LAZILY ]] && converted "$record" "$command"; then
    echo "converted before: nothing in $RAW_PATH has changed"
  else
    mkdir -p "$DATA_PATH"
    rm -f "$record"
    echo "$command" >"$record.$$.part"  # as old as the start: what changes during the conversion counts as changed
    script "$@" || status=$?
    [[ $status != 0 ]] || mv "$record.$$.part" "$record"
    rm -f "$record.$$.part"
    return $status
  fi
}

converted() {  # converted RECORD COMMAND: was it made by this command, and is all of RAW_PATH older?
  local newer
  [[ $(cat "$1" 2>/dev/null) == "$2" ]] && newer=$(find -L "$RAW_PATH" -cnewer "$1") && [[ -z $newer ]] &&
    exists "$DATA_PATH"/images/*.npy && exists "$DATA_PATH"/labels/*.npy
}

#### Processes and signals #########################################################################
SHARE=  # threads of a process; empty: all cores

share_cores() {  # share_cores PROCESSES: set SHARE, unless the user sets OMP_NUM_THREADS
  local cores=${SHARE:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}  # nproc: those that this process may use
  [[ -n ${OMP_NUM_THREADS:-} ]] || SHARE=$((cores > $1 ? cores / $1 : 1))
}

call() {  # call ARGUMENT ...: run it, or print the command
  if [[ $DRY_RUN == 1 ]]; then
    printf '%s' "${SHARE:+OMP_NUM_THREADS=$SHARE }"
    printf '%q ' "$PYTHON" "$@"
    echo
  else
    [[ -z $SHARE ]] || export OMP_NUM_THREADS=$SHARE
    "$PYTHON" "$@"
  fi
}

script() { call "$HERE/$1" "${@:2}"; }  # script SCRIPT ARGUMENT ...

one_process() { [[ $1 != *,* && -z $TORCHRUN_ARGS ]]; }  # one_process GPUS

script_on() {  # script_on GPUS SCRIPT ARGUMENT ...: torchrun starts a process for each of several GPUs (0,1)
  local commas=${1//[^,]/}
  local processes=$((${#commas} + 1))
  if one_process "$1"; then
    script "${@:2}"
  else
    [[ $processes == 1 ]] || share_cores "$processes"
    # shellcheck disable=SC2086 # several words
    call -m torch.distributed.run ${TORCHRUN_ARGS:---standalone} --nproc_per_node "$processes" "$HERE/$2" "${@:3}"
  fi
}

start() {  # start COMMAND ...: run it as JOB, a process group of its own, which `stop` sends signals to
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

finish() {  # finish JOB: wait for its end, and return its exit code
  [[ -z $1 ]] || wait "$1"
}

stop() {  # stop SIGNAL STATUS: send the signal to all jobs, wait for their end, exit
  trap '' INT TERM HUP
  local group
  for group in $(jobs -p); do kill -s "$1" -- "-$group" 2>/dev/null || true; done
  wait
  exit "$2"
}

ended() {  # at the end of a run that has failed: how to go on, and where it stopped
  local status=$?
  [[ $status != 0 ]] || return 0
  if [[ -z $OWN_TIMESTAMP ]] && exists "$DATA_PATH"/models/snapshots/*/*_"$TRAINING_TIMESTAMP.ckpt"; then
    echo "run.sh: to go on where it stopped: TRAINING_TIMESTAMP=$TRAINING_TIMESTAMP before the same command" >&2
  fi
  echo "run.sh: stopped in $STAGE (exit code $status)" >&2
}
