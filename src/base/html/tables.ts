import { Markup, markup, show } from './markup.js';

export interface Column<R> {
  readonly title: string;
  readonly cell: (row: R, index: number) => string | Markup;
  /** Numbers are aligned right and sorted by value. */
  readonly value?: (row: R, index: number) => number | null | undefined;
}

export const numeric = <R>(title: string, value: (row: R, index: number) => number | null | undefined): Column<R> => ({
  title,
  value,
  cell: (row, index) => show(value(row, index)),
});

/** A table that sorts by a click on its heads. */
export function sortable<R>(rows: readonly R[], columns: readonly Column<R>[], caption?: string): Markup {
  const head = columns.map((c) => markup`<th scope="col" ${new Markup(c.value ? ' class="num"' : '')}>${c.title}</th>`);
  const body = rows.map((row, i) => {
    const cells = columns.map((c) => {
      const value = c.value?.(row, i);
      const sort = c.value && new Markup(` class="num" data-value="${value ?? ''}"`);
      return markup`<td${sort}>${c.cell(row, i)}</td>`;
    });
    return markup`<tr>
      ${cells}
    </tr> `;
  });
  return markup`<div class="scroll">
    <table class="sort">
      ${
        caption !== undefined &&
        markup`<caption>
          ${caption}
        </caption>`
      }
      <thead>
        <tr>
          ${head}
        </tr>
      </thead>
      <tbody>
        ${body}
      </tbody>
    </table>
  </div>`;
}
