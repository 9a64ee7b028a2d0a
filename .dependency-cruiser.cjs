// The floors of the house: an import goes down, never up or sideways (docs/architecture.md).
const floors = [
  ['commands'],
  ['batch'],
  ['train'],
  ['quant', 'moe', 'validate', 'export'],
  ['targets', 'tune'],
  ['arch'],
  ['nn', 'layout'],
  ['tensor'],
  ['backend'],
  ['checkpoint', 'tokenizer'],
  ['formats'],
  ['base'],
];
const up = floors.flatMap((names, level) =>
  names.map((name) => ({
    name: `${name}-imports-down`,
    severity: 'error',
    from: { path: `^src/${name}/` },
    to: {
      path: `^src/(${[...floors.slice(0, level).flat(), ...names.filter((n) => n !== name), 'cli'].join('|')})(/|\\.ts$)`,
    },
  })),
);
// backend and tensor know nothing of files: checkpoints reach a device in arch and above.
const fileBlind = {
  name: 'devices-know-no-files',
  severity: 'error',
  from: { path: '^src/(backend|tensor|nn)/' },
  to: { path: '^src/(checkpoint|tokenizer|formats)/' },
};
module.exports = {
  forbidden: [
    ...up,
    fileBlind,
    { name: 'no-circular', severity: 'error', from: {}, to: { circular: true } },
    {
      name: 'one-door-to-native',
      severity: 'error',
      from: { pathNot: '^src/backend/load\\.ts$' },
      to: { path: '\\.node$' },
    },
  ],
  options: {
    doNotFollow: { path: 'node_modules' },
    tsPreCompilationDeps: true,
    tsConfig: { fileName: 'tsconfig.json' },
    enhancedResolveOptions: { extensions: ['.ts', '.js', '.json'] },
  },
};
