#!/bin/sh
# All GPU tests and benches in one call. With Node here: builds and runs. Without: unpacks .carry (npm run gpu:pack).
#   scripts/test-gpu.sh [name filter]
set -e
cd "$(dirname "$0")/.."
if command -v node >/dev/null 2>&1 && [ -d node_modules ]; then
  node scripts/build-native.mjs --cuda
  npx tsc -p tsconfig.gpu.json
  work=$PWD
  mkdir -p build/gpu/node_modules/vitest
  cp test/gpu/vitest.mjs build/gpu/node_modules/vitest/index.mjs
  echo '{"name":"vitest","version":"0.0.0","type":"module","exports":"./index.mjs"}' >build/gpu/node_modules/vitest/package.json
  cp test/gpu/run.mjs build/gpu/run.mjs
  for name in fixtures package.json calibration schemas; do [ -e "$name" ] && ln -sfn "$PWD/$name" "build/gpu/$name"; done
  node=node
  main=build/gpu/run.mjs
else
  work=${TMPDIR:-/tmp}/deepseek-convert-gpu
  mkdir -p "$work/bin"
  [ -x "$work/bin/node" ] || { xz -dc .carry/node-*.xz >"$work/bin/node.part" && chmod +x "$work/bin/node.part" && mv "$work/bin/node.part" "$work/bin/node"; }
  tar -C "$work" -xJf .carry/stage.tar.xz
  ln -sfn "$PWD/fixtures" "$work/fixtures"
  ln -sfn "$PWD/fixtures" "$work/build/gpu/fixtures"
  node=$work/bin/node
  main=test/gpu/run.mjs
fi
cd "$work"
DEEPSEEK_CONVERT_BUILD=$work/build exec "$node" "$main" build/gpu "$@"
