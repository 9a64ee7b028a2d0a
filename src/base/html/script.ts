/**
 * What the page does beyond standing there: tables sort, a heat map says the value under the finger, printing opens
 * what is folded. All of it can fail without loss: the page is complete as it comes.
 */
export const pageScript = `
'use strict';
for (const table of document.querySelectorAll('table.sort')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((th, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = th.textContent;
    th.textContent = '';
    th.append(button);
    th.setAttribute('aria-sort', 'none');
    button.addEventListener('click', () => {
      const now = th.getAttribute('aria-sort');
      const numeric = th.classList.contains('num');
      const up = now === 'none' ? !numeric : now === 'descending';
      heads.forEach((other) => other.setAttribute('aria-sort', 'none'));
      th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = (row) => {
        const cell = row.cells[column];
        const raw = cell.dataset.value ?? cell.textContent.trim();
        return numeric ? (raw === '' || Number.isNaN(Number(raw)) ? -Infinity : Number(raw)) : raw;
      };
      const rows = [...table.tBodies[0].rows].map((row, i) => ({ row, i, k: key(row) }));
      const order = (a, b) => (numeric ? a.k - b.k : a.k.localeCompare(b.k, 'en', { numeric: true }));
      rows.sort((a, b) => (up ? order(a, b) : order(b, a)) || a.i - b.i);
      table.tBodies[0].append(...rows.map(({ row }) => row));
    });
  });
}
const data = JSON.parse(document.getElementById('data').textContent);
for (const area of document.querySelectorAll('[data-plot]')) {
  const map = data[area.dataset.plot];
  const readout = area.closest('.panel').querySelector('.readout');
  const tell = (event) => {
    const box = area.getBoundingClientRect();
    const y = Math.floor(((event.clientY - box.top) / box.height) * map.rows.length);
    const row = map.rows[y];
    const x = Math.floor(((event.clientX - box.left) / box.width) * map.columns);
    if (!row || x < 0 || x >= map.columns || row[x] === undefined) return;
    readout.textContent = map.row + ' ' + y + ', ' + map.column + ' ' + x + ': ' + map.what + ' ' + row[x];
  };
  area.addEventListener('pointermove', tell);
  area.addEventListener('pointerdown', tell);
}
const choose = (name) => {
  const chosen = [...document.querySelectorAll('input[name^="' + name + '-"]:checked')].map((input) => input.value);
  const wanted = chosen.join('-');
  for (const panel of document.querySelectorAll('.panel[data-group="' + name + '"]')) panel.hidden = panel.id !== name + '-' + wanted;
};
const inputs = [...document.querySelectorAll('.tabs input')];
for (const tabs of document.querySelectorAll('.tabs')) tabs.hidden = false;
for (const input of inputs) input.addEventListener('change', () => choose(input.name.split('-')[0]));
for (const name of new Set(inputs.map((input) => input.name.split('-')[0]))) choose(name);
let closed = [];
addEventListener('beforeprint', () => {
  closed = [...document.querySelectorAll('details:not([open])')];
  closed.forEach((d) => (d.open = true));
});
addEventListener('afterprint', () => closed.forEach((d) => (d.open = false)));
`.trim();
