import { Markup, markup } from './markup.js';
import { pageScript } from './script.js';
import { styleSheet } from './style.js';

/**
 * One HTML file: no scripts, styles, fonts or images from anywhere else, and a policy that forbids them. All text is in
 * the file as it comes; the script only sorts, switches and reads out.
 * @param data what the script reads, by the ids of plots
 */
export function page(title: string, main: Markup, data: Readonly<Record<string, unknown>> = {}): string {
  return markup`<!doctype html>
    <html lang="en">
      <head>
        <meta charset="utf-8" />
        <meta name="viewport" content="width=device-width,initial-scale=1" />
        <meta
          http-equiv="Content-Security-Policy"
          content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
        />
        <meta name="color-scheme" content="light dark" />
        <meta name="generator" content="deepseek-convert" />
        <link rel="icon" href="data:," />
        <title>${title}</title>
        <style>
          ${new Markup(styleSheet)}
        </style>
      </head>
      <body>
        <main>${main}</main>
        <script type="application/json" id="data">
          ${new Markup(JSON.stringify(data).replaceAll('<', '\\u003c'))}
        </script>
        <script>
          ${new Markup(pageScript)};
        </script>
      </body>
    </html> `.text;
}

export interface Section {
  readonly id: string;
  readonly title: string;
  readonly body: Markup;
}

/** Sections one below the other, and links to them in front. */
export const linkedSections = (sections: readonly Section[]): Markup =>
  markup`<nav>${sections.map(({ id, title }) => markup`<a href="#${id}">${title}</a>`)}</nav>
    ${sections.map(
      ({ id, title, body }) =>
        markup`<section>
          <h2 id="${id}">${title}</h2>
          ${body}
        </section> `,
    )}`;
