import { Expected, custom, text, type Option } from '../base/options.js';
import { gates, type GateBounds } from '../validate/gates.js';

type Bound = number | null | undefined;

/** Key of the section of a job file that holds bounds: `gates:`. */
export const gateGroup = 'gates';
const section = 'Gates (defaults depend on the kind of conversion; off: no gate):';

/** One option for each gate, from the same table that judges. */
export const gateOptions = Object.fromEntries(
  gates.map((gate): [string, Option<Bound>] => {
    const { quantized, restructured } = gate.bounds;
    const show = (bound: number | null): string => (bound === null ? 'off' : String(bound));
    const note =
      quantized === restructured ? show(quantized) : `${show(quantized)}, dense -> MoE ${show(restructured)}`;
    const spec = { section, group: gateGroup, help: `${gate.metric}.`, defaultNote: note };
    const option = custom<Bound>(spec, 'x|off', (given) => {
      if (given === 'off') return null;
      const value = Number(given);
      if (given.trim() === '' || !Number.isFinite(value)) throw new Expected('a number, or off');
      return value;
    });
    return [gate.id, option];
  }),
);

/** The bounds that were given. */
export function boundsOf(given: object): GateBounds {
  const all = given as Readonly<Record<string, number | null | undefined>>;
  return Object.fromEntries(
    gates.filter(({ id }) => all[id] !== undefined).map(({ id }) => [id, all[id] as number | null]),
  );
}

const reports = 'Reports:';
export const reportOptions = {
  report: text({ value: 'report.html', section: reports, help: 'Write the validation as one self-contained HTML file.' }), // prettier-ignore
  reportJson: text({ value: 'report.json', section: reports, help: 'Write it as JSON (schemas/validate-report.v1.schema.json).' }), // prettier-ignore
  reportMd: text({ value: 'report.md', section: reports, help: 'Write it as Markdown.' }),
} as const;
