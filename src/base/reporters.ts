/** Forms that CI systems read: workflow commands of GitHub Actions, JUnit XML. */

/** One annotation; GitHub's documentation of workflow commands has the escapes. */
export function githubAnnotation(level: 'error' | 'warning' | 'notice', title: string, message: string): string {
  // What ends a command or a property there.
  const escaped = (text: string) => text.replaceAll('%', '%25').replaceAll('\r', '%0D').replaceAll('\n', '%0A');
  const property = escaped(title).replaceAll(':', '%3A').replaceAll(',', '%2C');
  return `::${level} title=${property}::${escaped(message)}`;
}

export interface JunitCase {
  readonly classname: string;
  readonly name: string;
  readonly seconds: number;
  /** What came of it: a failure is a judgement (a gate), an error is work that broke. */
  readonly outcome:
    | { readonly kind: 'passed' }
    | { readonly kind: 'failure' | 'error'; readonly message: string; readonly type: string; readonly body: string }
    | { readonly kind: 'skipped'; readonly message: string };
}

/** JUnit XML of one suite. */
export function junitXml(suite: string, cases: readonly JunitCase[]): string {
  const count = (kind: JunitCase['outcome']['kind']) => cases.filter(({ outcome }) => outcome.kind === kind).length;
  const totals = `tests="${cases.length}" failures="${count('failure')}" errors="${count('error')}" skipped="${count('skipped')}"`;
  const seconds = (value: number) => String(Number(value.toFixed(3)));
  const lines = cases.map(({ classname, name, seconds: time, outcome }) => {
    const open = `    <testcase classname="${xmlText(classname)}" name="${xmlText(name)}" time="${seconds(time)}"`;
    if (outcome.kind === 'passed') return `${open} />`;
    const message = `message="${xmlText(outcome.message)}"`;
    const inner =
      outcome.kind === 'skipped'
        ? `<skipped ${message} />`
        : `<${outcome.kind} ${message} type="${xmlText(outcome.type)}">${xmlText(outcome.body)}</${outcome.kind}>`;
    return `${open}>\n      ${inner}\n    </testcase>`;
  });
  return [
    '<?xml version="1.0" encoding="UTF-8"?>',
    `<testsuites ${totals}>`,
    `  <testsuite name="${xmlText(suite)}" ${totals} time="${seconds(cases.reduce((sum, { seconds }) => sum + seconds, 0))}">`,
    ...lines,
    '  </testsuite>',
    '</testsuites>',
  ].join('\n');
}

// XML 1.0 has no form for most control characters: error messages may quote a damaged file's bytes.
const unprintable = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g;

function xmlText(value: string): string {
  const entities: Readonly<Record<string, string>> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&apos;' }; // prettier-ignore
  return value.replace(unprintable, '\ufffd').replace(/[&<>"']/g, (character) => entities[character]!);
}
