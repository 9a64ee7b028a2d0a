import { badUsage, didYouMean } from '../base/errors.js';

const placeholder = /\$(\$)?\{([^{}]*)\}/g;

/**
 * Fills `${NAME}` and `${NAME:-default}` in every text of a value; `$${NAME}` stands for itself. Names are those of
 * `own` (model, recipe, name, input), then of the environment. Keys are left alone, and nothing is evaluated: what is
 * filled in is not looked at again. Errors: usage, for a name that nothing gives.
 */
export function substitute(
  value: unknown,
  own: ReadonlyMap<string, string>,
  environment: NodeJS.ProcessEnv,
  where: string,
): unknown {
  if (typeof value === 'string') return fill(value, own, environment, where);
  if (Array.isArray(value)) return value.map((item, i) => substitute(item, own, environment, `${where}[${i}]`));
  if (typeof value !== 'object' || value === null) return value;
  const entries = Object.entries(value).map(([key, item]) => [key, substitute(item, own, environment, `${where}.${key}`)]); // prettier-ignore
  return Object.fromEntries(entries) as unknown;
}

function fill(text: string, own: ReadonlyMap<string, string>, environment: NodeJS.ProcessEnv, where: string): string {
  return text.replace(placeholder, (whole, escaped: string | undefined, inside: string) => {
    if (escaped !== undefined) return whole.slice(1);
    const [, name, fallback] = /^([A-Za-z_]\w*)(?::-(.*))?$/.exec(inside) ?? [];
    if (name === undefined) {
      throw badUsage('A placeholder is not understood', {
        where,
        got: whole,
        expected: '${NAME} or ${NAME:-default}; $${ stands for ${',
      });
    }
    const value = own.get(name) ?? (Object.hasOwn(environment, name) ? environment[name] : undefined);
    if (value !== undefined && value !== '') return value;
    if (fallback !== undefined) return fallback;
    const near = didYouMean(name, [...own.keys(), ...Object.keys(environment)]);
    throw badUsage(`${whole} has no value`, {
      where,
      hint: `Set ${name} in the environment, or write \${${name}:-default}.${near === undefined ? '' : ` Did you mean ${near}?`}`,
    });
  });
}
