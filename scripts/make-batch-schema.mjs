// Writes schemas/batch.v1.schema.json from the option tables of src/commands (npm run docs). With --check: says whether it is current.
import { readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { format, resolveConfig } from 'prettier';

const root = new URL('../', import.meta.url);
const { commands } = await import(new URL('dist/commands/index.js', root));
const { jobCommands } = await import(new URL('dist/commands/batch.js', root));
const { jobFileSchema } = await import(new URL('dist/batch/schema.js', root));

const name = 'schemas/batch.v1.schema.json';
const target = new URL(name, root);
const filepath = fileURLToPath(target);
const made = await format(JSON.stringify(jobFileSchema(await jobCommands(commands))), {
  ...(await resolveConfig(filepath)),
  filepath,
});
if (process.argv.includes('--check')) {
  const current = readFileSync(target, 'utf8') === made;
  console.log(current ? `${name} is current.` : `${name} is not what the option tables say: npm run docs`);
  process.exitCode = current ? 0 : 1;
} else {
  writeFileSync(target, made);
}
