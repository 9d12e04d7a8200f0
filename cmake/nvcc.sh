# nvcc.sh REPORT nvcc ...: runs nvcc and keeps what the assembler says of registers and spills.
# A shell script, since a command that names a build environment's cmake would be another one in the next environment.
report=$1
shift
mkdir -p "$(dirname "$report")"
"$@" 2> "$report"
code=$?
# What is neither the assembler's account nor the name of a kernel is for whoever builds.
grep -v -e '^ptxas info' -e 'bytes stack frame' "$report" >&2
exit $code
