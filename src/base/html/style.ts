/** The report's style sheet: light, dark (as the system says) and print (always light). */
const light = {
  ink: '#1b2027', soft: '#5b6572', paper: '#ffffff', panel: '#f6f8fa', rule: '#d9dfe6', good: '#14713a', bad: '#b3261e',
  'good-paper': '#e5f5ea', 'bad-paper': '#fdeceb', s0: '#2b6cb0', s1: '#c05621', mark: '#fde2b8', link: '#2b6cb0',
}; // prettier-ignore
const dark = {
  ink: '#e4e8ee', soft: '#9aa5b3', paper: '#12161b', panel: '#1a2027', rule: '#333d48', good: '#5fce8b', bad: '#ff8a80',
  'good-paper': '#12301f', 'bad-paper': '#3c1a18', s0: '#6cb2f5', s1: '#f0a467', mark: '#5c4315', link: '#6cb2f5',
}; // prettier-ignore
/** From nothing to much: pale to deep on paper, deep to bright in the dark. */
const heatLight = ['#f0f3f6', '#dceaf4', '#c1dcec', '#9cc9e1', '#f6d58b', '#f2b35e', '#e98a3f', '#d65f2c', '#b2341d', '#7d1411']; // prettier-ignore
const heatDark = ['#1c242c', '#1d3a4f', '#215370', '#2b7293', '#6b6a35', '#957a2d', '#c08a2e', '#dd7a3a', '#f0664c', '#ff9d8f']; // prettier-ignore

const variables = (colours: Readonly<Record<string, string>>, heat: readonly string[]): string =>
  [...Object.entries(colours), ...heat.map((c, i) => [`h${i}`, c] as const)].map(([k, v]) => `--${k}:${v}`).join(';');

const heat = heatLight.map((_, i) => `.h${i}{fill:var(--h${i})}.b${i}{background:var(--h${i})}`).join('');

export const styleSheet = `
:root{color-scheme:light dark;${variables(light, heatLight)}}
@media (prefers-color-scheme:dark){:root{${variables(dark, heatDark)}}}
@media print{:root{color-scheme:light;${variables(light, heatLight)}}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:70rem;margin:0 auto;padding:1rem 1rem 4rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0 .25rem}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-bottom:.25rem;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:1.25rem 0 .4rem}
p{margin:.4rem 0;max-width:46rem}
.soft,small{color:var(--soft);font-size:.875rem}
a{color:var(--link)}
code,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.9em;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:.75rem 0;font-size:.9rem}
.verdict{display:flex;flex-wrap:wrap;align-items:baseline;gap:.25rem .75rem;padding:.75rem 1rem;border-radius:.5rem;border-left:.4rem solid}
.verdict b{font-size:1.3rem}
.verdict.pass{background:var(--good-paper);border-color:var(--good)}.verdict.pass b{color:var(--good)}
.verdict.fail{background:var(--bad-paper);border-color:var(--bad)}.verdict.fail b{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:.75rem 0}
.tile{background:var(--panel);border:1px solid var(--rule);border-radius:.5rem;padding:.6rem .8rem}
.tile b{display:block;font-size:1.4rem;line-height:1.3}
.tile.fail{border-color:var(--bad)}.tile.fail b{color:var(--bad)}
.tile span{display:block;color:var(--soft);font-size:.82rem;line-height:1.35}
ul.found{margin:.5rem 0;padding-left:1.2rem}ul.found li{margin:.25rem 0}
.scroll{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem}
caption{text-align:left;color:var(--soft);font-size:.85rem;padding:.2rem 0}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;white-space:nowrap}
td code{overflow-wrap:normal}.flag{white-space:nowrap}td.num,th.num{text-align:right;white-space:nowrap}th small,td small code{white-space:nowrap}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid var(--link);outline-offset:2px}
th[aria-sort] button::after{content:" \\2195";color:var(--soft);font-weight:400}
th[aria-sort=ascending] button::after{content:" \\2191";color:var(--ink)}
th[aria-sort=descending] button::after{content:" \\2193";color:var(--ink)}
.status{display:inline-block;min-width:3.6em;font-weight:600}
.status.pass{color:var(--good)}.status.fail{color:var(--bad)}.status.off,.status.skipped{color:var(--soft);font-weight:400}
tr.fail td{background:var(--bad-paper)}
.remedy{margin:.25rem 0 0}
.nw{white-space:nowrap}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--link);padding:.25rem 0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem 2rem;align-items:start}
.two>*{min-width:0}.two th,.two td{padding:.35rem .4rem}
.plot{margin:.5rem 0 .25rem;padding-left:3.2rem;padding-right:.6rem}
.plot.heat{padding-left:2rem}
.ytitle{margin-left:-3.2rem;color:var(--soft);font-size:.8rem;margin-bottom:.3rem}
.plot.heat .ytitle{margin-left:-2rem}
.xtitle{color:var(--soft);font-size:.8rem;margin-top:1.35rem}
.area{position:relative;width:100%}
.area svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible;display:block}
.xt,.yt{position:absolute;font-size:.75rem;color:var(--soft);white-space:nowrap;line-height:1}
.xt{top:calc(100% + .35rem);transform:translateX(-50%)}
.yt{right:calc(100% + .4rem);transform:translateY(50%)}
path{vector-effect:non-scaling-stroke}
.grid{stroke:var(--rule);fill:none;stroke-width:1px}
.line{fill:none;stroke-width:1.75px;stroke-linejoin:round}
.dots{fill:none;stroke-width:5px;stroke-linecap:round}
.bound{fill:none;stroke:var(--bad);stroke-width:1.25px;stroke-dasharray:5 4}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}
.bars{fill:var(--s0)}
.hx{fill:none}
.ring{fill:none;stroke:var(--ink);stroke-width:2px}
${heat}
.keys,.legend{display:flex;flex-wrap:wrap;align-items:center;gap:.25rem 1rem;font-size:.8rem;color:var(--soft);margin:.2rem 0 .5rem}
.legend{gap:0;margin-left:2rem}.legend i{width:1.1rem;height:.7rem;display:block}.legend span{padding:0 .4rem}.legend span:first-child{padding-left:0}
.key{display:inline-block;width:1.3rem;height:0;border-top:3px solid;vertical-align:middle;margin-right:.4rem}
.key.s0{border-color:var(--s0)}.key.s1{border-color:var(--s1)}.key.bound{border-top:2px dashed var(--bad)}
.readout{min-height:1.4em;font-size:.85rem;margin:.2rem 0 .2rem 2rem}
.tabs:not([hidden]){display:flex;flex-wrap:wrap;gap:.35rem;margin:.5rem 0}
.tabs input{position:absolute;opacity:0;pointer-events:none}
.tabs label{border:1px solid var(--rule);border-radius:1rem;padding:.2rem .75rem;font-size:.85rem;cursor:pointer;background:var(--panel)}
.tabs input:checked+label{background:var(--ink);color:var(--paper);border-color:var(--ink)}
.tabs input:focus-visible+label{outline:2px solid var(--link);outline-offset:2px}
.pair{border:1px solid var(--rule);border-radius:.5rem;margin:.6rem 0;padding:.6rem .8rem;break-inside:avoid}
.pair h3{margin:0 0 .3rem;font-weight:600;font-size:.9rem}
.gen{font-size:.9rem}.words{white-space:pre-wrap;overflow-wrap:anywhere}
.gen h4{margin:.2rem 0;font-size:.78rem;color:var(--soft);font-weight:600}
mark{background:var(--mark);color:inherit;border-radius:.15rem;padding:0 .1rem;box-decoration-break:clone;-webkit-box-decoration-break:clone}
.picture{font-size:.8rem;line-height:1.2;margin:.5rem 0}
.bar{display:block;height:.8rem;min-width:1px;background:var(--s0);border-radius:.15rem}td:has(>.bar){width:50%}
.tree{font-size:.9rem}.tree details,.tree .leaf{margin:0 0 0 1rem}.tree>details{margin-left:0}.tree .leaf{padding:.1rem 0 .1rem 1rem}.tree .size{color:var(--soft);margin-left:.5rem;white-space:nowrap}
.facts td:first-child{color:var(--soft);white-space:nowrap}
@media (max-width:40rem){
 main{padding:.5rem .75rem 3rem}
 th,td{padding:.35rem .45rem}th[aria-sort] button::after{content:""}
 table.cards thead{display:none}
 table.cards,table.cards tbody,table.cards tr,table.cards td{display:block;width:100%}
 table.cards tr{border:1px solid var(--rule);border-radius:.5rem;margin:.5rem 0;padding:.35rem 0}
 table.cards td{border:0;padding:.15rem .75rem;text-align:left}
 table.cards td[data-name]{display:flex;gap:.75rem;justify-content:space-between}
 table.cards td[data-name]::before{content:attr(data-name);color:var(--soft)}
 table.cards td:empty{display:none}
}
@media print{
 body{font-size:11px}main{max-width:none;padding:0}nav,.tabs,.readout,th[aria-sort] button::after{display:none}
 h2{break-after:avoid}table,.plot,.tile{break-inside:avoid}.scroll{overflow:visible}
 *{-webkit-print-color-adjust:exact;print-color-adjust:exact}
 details>summary{color:var(--ink)}
}`.trim();
