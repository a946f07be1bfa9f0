"""The page: one Jinja2 template (autoescaped), one style sheet, one short script that only adds sorting by column."""

# ruff: noqa: E501  (markup)

STYLE = """
:root { color-scheme: light dark;
  --page: #f7f6f3; --card: #ffffff; --ink: #1d2024; --soft: #5d646d; --line: #dcdad4; --faint: #efede8;
  --accent: #2257a8; --bad: #a32121; --bad-bg: #fbe6e4; --warn: #8a4b00; --warn-bg: #fdeed8; --mild: #6b5b00;
  --mild-bg: #f7f2cf; --good: #17603a; --good-bg: #e0f2e6; --none-bg: #e9e9ec;
  --c0: #2257a8; --c1: #c2410c; --c2: #15803d; --c3: #9333a8; --c4: #a16207; --c5: #0e7490; --c6: #be185d; --c7: #57534e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #15171a; --card: #1d2024; --ink: #e8e6e1; --soft: #a2a8b0; --line: #363a40; --faint: #262a2f;
  --accent: #8ab4f8; --bad: #ffaea6; --bad-bg: #4a1d1b; --warn: #ffc98a; --warn-bg: #47300f; --mild: #eadb7c;
  --mild-bg: #3b3611; --good: #96dcb2; --good-bg: #163a26; --none-bg: #33373d;
  --c0: #8ab4f8; --c1: #fb923c; --c2: #6ee7a0; --c3: #d8a3e8; --c4: #e6c34a; --c5: #5cc8de; --c6: #f58bb8; --c7: #b8b2aa; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; overflow-wrap: break-word; }
header.top, main, footer { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header.top { padding-top: 28px; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 44px 0 4px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 24px 0 6px; }
h4 { font-size: .92rem; margin: 14px 0 4px; font-weight: 600; }
p { margin: 6px 0; max-width: 96ch; } .soft, small { color: var(--soft); } small { font-size: .82rem; }
a { color: var(--accent); }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 14px 0 0; padding: 0; font-size: .88rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px; margin: 14px 0; }
.card h3 { margin-top: 0; }
.say { font-size: 1.08rem; }
.badge { display: inline-block; border-radius: 4px; padding: 0 7px; font-size: .85rem; font-weight: 600; }
.v-exact { background: var(--bad-bg); color: var(--bad); } .v-recognisable { background: var(--warn-bg); color: var(--warn); }
.v-partly { background: var(--mild-bg); color: var(--mild); } .v-hidden { background: var(--good-bg); color: var(--good); }
.v-undecided { background: var(--none-bg); color: var(--ink); }
.oracle { background: var(--warn-bg); color: var(--warn); border-radius: 4px; padding: 0 6px; font-weight: 600; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: 8px 0; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
.scroll > table.numbers { min-width: 100%; }
caption { text-align: left; color: var(--soft); padding: 2px 0 6px; }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { vertical-align: bottom; font-weight: 600; color: var(--soft); font-size: .8rem; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; } table.sortable th, table.sortable td { padding: 5px 8px; }
tbody th { font-weight: 500; } tbody th.name { min-width: 150px; }
tr.defense th { background: var(--faint); font-weight: 600; } tr.defense small { font-weight: 400; }
tr.base td, tr.base th { color: var(--soft); font-style: italic; }
td small, th small { display: block; }
thead button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; text-align: inherit; }
thead button:hover { color: var(--accent); } th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
.bar { position: relative; display: block; width: 190px; height: 14px; background: var(--faint); border-radius: 3px;
  margin-top: 4px; } .bar i { position: absolute; inset: 0 auto 0 0; border-radius: 3px; background: var(--c0); }
.bar b { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }
.f-exact i { background: #d1443c; } .f-recognisable i { background: var(--c1); } .f-partly i { background: var(--c4); }
.f-hidden i { background: var(--c2); }
table.strip { width: auto; } table.strip th, table.strip td { border: 0; padding: 4px 8px; text-align: center; font-weight: 400; }
table.strip thead th { font-weight: 600; color: var(--ink); vertical-align: top; min-width: 112px; max-width: 150px; overflow-wrap: anywhere; }
table.strip thead small { font-weight: 400; } table.strip thead th.baseline { color: var(--soft); font-style: italic; }
table.strip tr > th:first-child { position: sticky; left: 0; background: var(--card); z-index: 1; border-right: 1px solid var(--line); }
.strip img { image-rendering: pixelated; display: block; margin: 0 auto; }
.strip figure { margin: 0; display: inline-block; } .strip figcaption { font-size: .78rem; color: var(--soft); white-space: nowrap; }
.strip .exact figcaption { color: var(--bad); font-weight: 700; }
.strip .frame { display: flex; align-items: center; justify-content: center; border: 1px dashed var(--soft); font-size: .7rem;
  color: var(--soft); padding: 4px; }
.strip td.whole .frame { width: 130px; padding: 8px; font-size: .76rem; text-align: left; overflow-wrap: anywhere; white-space: pre-wrap; }
.drawn figure { margin: 0 0 10px; } .drawn img { max-width: 100%; height: auto; }
.film { display: flex; gap: 8px; } .grids { display: flex; flex-wrap: wrap; gap: 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 14px; }
.charts figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.charts figcaption { font-weight: 600; font-size: .88rem; } .charts figcaption small { font-weight: 400; display: block; }
svg.chart { width: 100%; height: auto; display: block; } svg.chart text { font-size: 11px; fill: var(--soft); }
svg.chart .grid { stroke: var(--line); stroke-width: 1; } svg.chart polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
polyline.dashed { stroke-dasharray: 6 4; } polyline.s0 { stroke: var(--c0); } polyline.s1 { stroke: var(--c1); } polyline.s2 { stroke: var(--c2); }
polyline.s3 { stroke: var(--c3); } polyline.s4 { stroke: var(--c4); } polyline.s5 { stroke: var(--c5); }
polyline.s6 { stroke: var(--c6); } polyline.s7 { stroke: var(--c7); } circle.s0, .b0 { fill: var(--c0); background: var(--c0); }
circle.s1, .b1 { fill: var(--c1); background: var(--c1); } circle.s2, .b2 { fill: var(--c2); background: var(--c2); }
circle.s3, .b3 { fill: var(--c3); background: var(--c3); } circle.s4, .b4 { fill: var(--c4); background: var(--c4); }
circle.s5, .b5 { fill: var(--c5); background: var(--c5); } circle.s6, .b6 { fill: var(--c6); background: var(--c6); }
circle.s7, .b7 { fill: var(--c7); background: var(--c7); }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 0; padding: 0; font-size: .8rem; }
.swatch { display: inline-block; width: 14px; height: 3px; vertical-align: middle; margin-right: 6px; }
.note { border-left: 3px solid var(--line); padding-left: 12px; color: var(--soft); }
.alarm { border-left: 3px solid var(--bad); padding-left: 12px; }
td.why { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 220px; max-width: 620px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto; font-size: .8rem; }
dl.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 16px; } dl.facts dt { color: var(--soft); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
details > summary { cursor: pointer; color: var(--accent); margin: 8px 0; }
footer { margin-top: 48px; padding-top: 14px; padding-bottom: 32px; border-top: 1px solid var(--line); color: var(--soft); }
@media (max-width: 640px) { header.top, main, footer { padding-left: 12px; padding-right: 12px; } .card { padding: 12px; }
  table.strip th, table.strip td { padding: 4px 5px; } .bar { width: 110px; }
  th, td { padding: 5px 7px; } dl.facts { grid-template-columns: 1fr; } dl.facts dd { margin-bottom: 6px; }
  table.numbers tbody th.name { min-width: 110px; } }
@media print { body { background: #fff; font-size: 11px; } nav { display: none; } .card, figure, tr, table.strip { break-inside: avoid; }
  .scroll { overflow: visible; } header.top, main, footer { max-width: none; padding: 0; }
  .badge, .bar, .bar i, .bar b, .swatch, .oracle { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => { const cell = row.cells[column]; const value = cell.dataset.v ?? cell.textContent.trim();
        return value === "" ? null : isNaN(value) ? value : Number(value); };
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter(row => !row.classList.contains("defense"));
        rows.sort((a, b) => { const x = key(a), y = key(b);
          if (x === null || y === null) return (x === null) - (y === null);
          const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
          return down ? -order : order; });
        body.append(...rows);
      }
    });
  });
}
"""

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="robots" content="noindex">
<title>{{ name }}: what the updates leak</title>
<style>{{ style }}</style>
</head>
<body>
{% macro badge(cell) %}<span class="badge v-{{ cell.verdict.split()[0] }}">{{ cell.verdict_words }}</span>{% endmacro %}
{% macro attack_name(cell) %}{{ cell.attack }}{% if cell.variant %}<small>{{ cell.variant }}</small>{% endif %}\
{% if cell.control_of and not cell.baseline_kind %}<small>control of {{ cell.control_of[0] if cell.control_of|length == 1 else cell.control_of|length|count("attack") }}</small>{% endif %}{% endmacro %}
{% macro picture(frame) %}<figure{% if frame.exact %} class="exact"{% endif %}>\
{% if frame.source %}<img src="{{ frame.source }}" width="{{ frame.width }}" height="{{ frame.height }}" alt="{{ frame.alt }}">\
{% else %}<div class="frame" style="width:{{ frame.width }}px;height:{{ frame.height }}px">{{ frame.empty }}</div>{% endif %}\
<figcaption>{{ frame.caption }}{% if frame.exact %} exact{% endif %}</figcaption></figure>{% endmacro %}
{% macro heads(names) %}<thead><tr>{% for name in names %}<th scope="col"{% if name[0] == "#" %} class="n"{% endif %}>{{ name|replace("#", "") }}</th>{% endfor %}</tr></thead>{% endmacro %}
{% macro sortcell(value, shown) %}<td class="n" data-v="{{ '' if value is none else value }}">{{ shown }}</td>{% endmacro %}
<header class="top">
<p class="soft">fedattack report</p>
<h1>{{ name }}</h1>
<p>{{ intro }}</p>
<nav aria-label="Sections"><ol>
{% for key, title in sections %}
<li><a href="#{{ key }}">{{ title }}</a></li>
{% endfor %}
</ol></nav>
</header>
<main>

<section id="headline"><h2>{{ titles.headline }}</h2>
{% if not headlines %}
<p class="note">There is nothing to compare: the run holds no result rows.</p>
{% endif %}
{% for line in headlines %}
<article class="card"><h3>{{ line.case }}</h3>
{% if line.reference %}
{% set best = line.reference.best %}
<p class="say">{{ badge(best) }} The best attack{% if line.reference.defense == "none" %} without a defense{% else %} against \
{{ line.reference.defense|defense }}{% endif %}, <strong>{{ best.attack }}</strong>{% if best.variant %} ({{ best.variant }}){% endif %}, \
reaches <strong>{{ best.psnr_db.mean|db }} dB</strong> on average over {{ best.images|count("image") }}\
{% if best.baseline %}; the best baseline ({{ best.baseline }}) has {{ best.baseline_db|db }} dB{% else %}; there is no baseline to compare with{% endif %}.</p>
<p>{{ shares(best) }}\
{% if best.failed_jobs %} <strong>{{ best.failed_jobs }} of {{ best.jobs|count("job") }} gave no result</strong>, so this is not the whole picture.{% endif %}\
{% if best.oracles %} <span class="oracle">oracle</span> It was given what a real server does not have: {{ best.oracles|join(", ") }}.{% endif %}\
{% if best.floor and best.floor.sigma %} Noise of σ ≥ {{ best.floor.sigma|small }} on every coordinate, {{ best.floor.share|small }} of the update's root mean square, would keep \
every unbiased attack below {{ best.floor.target_db|db(0) }} dB.{% endif %}</p>
{% for thing in revealed.get(line.case, []) %}
<p><span class="badge v-{{ "recognisable" if thing.told else "undecided" }}">{{ thing.badge }}</span> {{ thing.words }}</p>
{% endfor %}
{% else %}
<p class="say"><span class="badge v-undecided">no result</span> No attack gave a picture: see <a href="#failures">{{ titles.failures }}</a>.</p>
{% endif %}
{% if line.findings|length > 1 or line.reference %}
<div class="scroll" tabindex="0" role="region" aria-label="Best attack per defense, {{ line.case }}"><table class="numbers">
<thead><tr><th scope="col">Defense</th><th scope="col">Best attack</th><th scope="col">Mean PSNR, 0 to {{ exact_db|db(0) }} dB<small>the mark is the best baseline</small></th>
<th scope="col" class="n">PSNR, dB</th><th scope="col" class="n">Floor, dB</th><th scope="col" class="n">Effect of the defense, dB</th><th scope="col">Verdict</th></tr></thead><tbody>
{% for finding in line.findings %}
{% set cell = finding.best %}
<tr><th scope="row">{{ finding.defense|defense }}</th>
{% if cell %}
<td>{{ attack_name(cell) }}</td>
<td><span class="bar f-{{ cell.verdict.split()[0] }}" aria-hidden="true"><i style="width:{{ cell.psnr_db.mean|percent }}%"></i>\
{% if cell.baseline_db is not none %}<b style="left:{{ cell.baseline_db|percent }}%"></b>{% endif %}</span></td>
<td class="n">{{ cell.psnr_db.mean|db }}</td><td class="n">{{ cell.floor.words if cell.floor else "–" }}</td><td class="n">{% if finding.effect_db is not none %}{{ finding.effect_db|signed }}{% else %}–{% endif %}</td>
<td>{{ badge(cell) }}</td>
{% else %}
<td colspan="6" class="soft">no attack gave a result</td>
{% endif %}
</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if line.effects %}<p>{{ line.effects }}</p>{% endif %}
</article>
{% endfor %}
{% if headlines %}
<p class="note">How the words are chosen, image by image: <b>exact</b> from {{ exact_db|db(0) }} dB on (an error of 0.001 of the range);
<b>recognisable</b> from {{ recognisable_db|db(0) }} dB on and at least {{ recognisable_gain_db|db(0) }} dB above the best baseline;
<b>partly recovered</b> at least {{ partly_gain_db|db(0) }} dB above it; otherwise no better than that baseline. An attack gets the strongest
word that at least half of its images reach. PSNR has peak 1; {{ cap_db|db(0) }} dB means identical. Averages are over all images, and the
best attack is the one with the highest average. The words follow PSNR alone: a noisy picture with a low
PSNR may still be recognisable to a person, so look at the pictures.{% if revealed %} What they say of a person is tested by itself: <b>told</b> where an attack's pictures name the right person or class
better than chance and than every picture beside them that was made without this update, by a paired permutation test over clients (p ≤ {{ significant }}, times the number of attacks; each case, defense and thing by itself).{% endif %} A weak result is a fact about these attacks, no proof of safety.
The <b>floor</b> (Cramér-Rao) is the PSNR that the noise on the update, or else its rounding, leaves to the best unbiased attack without a prior, of all updates of the
same images together where the attacker has several. “≤” marks one that was
not computed to the end, so that the true one is lower; “not identifiable” counts image directions that the update does not tell at all. A prior, and the range
[0, 1], may beat a floor that lies near the baselines.</p>
{% endif %}
</section>

<section id="gallery"><h2>{{ titles.gallery }}</h2>
<p class="soft">Each picture is the saved file, enlarged by a whole factor without smoothing; brightness and contrast are never touched. Below each
picture is its PSNR. Shown are the first {{ caps.targets }} updates per case and defense and the first {{ caps.images }} images of each
(at most {{ caps.pictures|commas }} pictures), in the order of the run, not the best ones.</p>
{% if not groups %}<p class="note">There are no pictures.</p>{% endif %}
{% for group in groups %}
<article class="card"><h3>{{ group.case }} · {{ group.defense|defense }}</h3>
{% for target in group.targets %}
<h4>{{ target.title }}</h4>
<div class="scroll" tabindex="0" role="region" aria-label="Pictures of {{ target.title }}"><table class="strip">
<thead><tr><th scope="col">{{ "truth" if target.truth else "" }}</th>
{% for strip in target.strips %}
<th scope="col" class="{{ strip.kind }}">{{ strip.label }}{% if strip.note %}<small>{{ strip.note }}</small>{% endif %}</th>
{% endfor %}
</tr></thead><tbody>
{% for i in range(target.rows) %}
<tr><th scope="row">{% if target.truth and i < target.truth|length %}{{ picture(target.truth[i]) }}{% else %}image {{ i + 1 }}{% endif %}</th>
{% for strip in target.strips %}
{% if strip.empty %}
{% if i == 0 %}<td class="whole" rowspan="{{ target.rows }}"><div class="frame" style="min-height:{{ target.height }}px">{{ strip.empty }}</div></td>{% endif %}
{% elif i < strip.frames|length %}
<td class="{{ strip.kind }}"{% if strip.frames|length == 1 %} rowspan="{{ target.rows }}"{% endif %}>{{ picture(strip.frames[i]) }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% for film in target.films %}
<div class="scroll" tabindex="0" role="region" aria-label="Way of {{ film.label }}"><p class="soft">{{ film.label }}: {{ film.note }}</p><div class="film strip">{% for frame in film.frames %}{{ picture(frame) }}{% endfor %}</div></div>
{% endfor %}
{% if target.hidden %}<p class="soft">{{ target.hidden|count("more image") }} of this update not shown.</p>{% endif %}
{% endfor %}
{% if group.hidden %}<p class="soft">{{ group.hidden|count("more update") }} not shown.</p>{% endif %}
</article>
{% endfor %}
</section>

<section id="numbers"><h2>{{ titles.numbers }}</h2>
<p class="soft">Every figure is over all images of all jobs that gave a result, never the best ones. ± is the sample standard deviation. “Over baseline” is the
mean difference to the best baseline on the same images. The MSE columns are the geometric mean and the median. “Given” labels were the attack's input, so no accuracy
is stated{% if tables|selectattr("timesteps")|list %}; the same holds for timesteps, which count as found whichever image they belong to{% endif %}. Baselines are in italics; nearest-public looks at the truth and is a strict bar.</p>
{% if not tables %}<p class="note">There are no rows.</p>{% endif %}
{% for table in tables %}
<div class="scroll" tabindex="0" role="region" aria-label="Numbers of {{ table.case }}"><table class="numbers sortable"><caption>{{ table.case }}</caption>
<thead><tr><th scope="col">Attack</th><th scope="col" class="n">Jobs</th><th scope="col" class="n">Images</th><th scope="col" class="n">PSNR, dB<small>mean ± std</small></th>
<th scope="col" class="n">Min to max</th><th scope="col" class="n">Over<small>baseline, dB</small></th><th scope="col" class="n">SSIM</th>{% for net in table.nets %}<th scope="col" class="n">LPIPS<small>{{ net }}</small></th>{% endfor %}
<th scope="col" class="n">MSE<small>geometric</small></th><th scope="col" class="n">MSE<small>median</small></th><th scope="col" class="n">Labels<small>found</small></th>{% if table.timesteps %}<th scope="col" class="n">Timesteps<small>found</small></th>{% endif %}

<th scope="col" class="n">Exact</th><th scope="col" class="n">Floor<small>dB</small></th><th scope="col" class="n">Time<small>seconds a job</small></th><th scope="col" class="n">Time<small>ms a step</small></th></tr></thead>
{% for block in table.blocks %}
<tbody><tr class="defense"><th scope="rowgroup" colspan="{{ 14 + table.nets|length + table.timesteps }}">{{ block.defense|defense }}{% if block.facts %} <small>{{ block.facts }}</small>{% endif %}</th></tr>
{% for cell in block.cells %}
<tr{% if cell.baseline_kind %} class="base"{% endif %}><th scope="row" class="name">{{ attack_name(cell) }}</th>
{{ sortcell(cell.jobs, cell.jobs if not cell.failed_jobs else "%d of %d"|format(cell.jobs - cell.failed_jobs, cell.jobs)) }}
{{ sortcell(cell.images, cell.images) }}
{% if cell.psnr_db %}
<td class="n" data-v="{{ cell.psnr_db.mean }}"><b>{{ cell.psnr_db.mean|db }}</b>{% if cell.psnr_db.std is not none %} ± {{ cell.psnr_db.std|db }}{% endif %}</td>
{{ sortcell(cell.psnr_db.high, cell.psnr_db.low|db ~ " to " ~ cell.psnr_db.high|db) }}
{% else %}
{{ sortcell(none, "–") }}{{ sortcell(none, "–") }}
{% endif %}
{{ sortcell(cell.gain_db, cell.gain_db|signed) }}
{{ sortcell(cell.ssim, cell.ssim|db(3)) }}
{% for net in table.nets %}{{ sortcell(cell.lpips.get(net), cell.lpips.get(net)|db(3)) }}{% endfor %}

{{ sortcell(cell.mse_geometric, cell.mse_geometric|small) }}
{{ sortcell(cell.mse_median, cell.mse_median|small) }}
{{ sortcell(cell.label_accuracy, cell|labels) }}
{% if table.timesteps %}{{ sortcell(cell.timestep_accuracy, cell|timesteps) }}{% endif %}

{{ sortcell(cell.exact if cell.images else none, "%d of %d"|format(cell.exact, cell.images) if cell.images else "–") }}
{{ sortcell(cell.floor.psnr_db.mean if cell.floor and cell.floor.psnr_db else none, cell.floor.words if cell.floor else "–") }}
{{ sortcell(cell.seconds, cell.seconds|small) }}
{{ sortcell(cell.seconds_per_step, (cell.seconds_per_step * 1000)|small if cell.seconds_per_step is not none else "–") }}
</tr>
{% endfor %}
</tbody>
{% endfor %}
</table></div>
{% endfor %}
{% if controls %}
<div class="scroll" tabindex="0" role="region" aria-label="Controls that were left out"><table class="numbers">
<caption>Controls that attacks with a prior were run without: what the prior alone is worth is then less sure</caption>{{ heads(["Case", "Attack", "Control", "Reason"]) }}<tbody>
{% for line in controls %}
<tr><th scope="row" class="name">{{ line.case }}</th><td>{{ line.attack }}</td><td>{{ line.control }}</td><td class="why">{{ line.reason }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>

<section id="figures"><h2>{{ titles.figures }}</h2>
{% if not figures %}<p class="note">None was asked for ([[figure]] tables in the recipe).</p>{% endif %}
{% for block in figures %}
<article class="card drawn"><h3>{{ block.title }}</h3>
{% for problem in block.problems %}<p class="alarm">Not drawn in full: {{ problem }}.</p>
{% endfor %}
{% for frame in block.frames %}{{ picture(frame) }}
{% endfor %}
{% for table in block.tables %}<details><summary>Table</summary><div class="scroll"><pre>{{ table }}</pre></div></details>
{% endfor %}
{% if block.files %}<p class="soft">In the run folder: {{ block.files|join(", ") }}</p>{% endif %}
</article>
{% endfor %}
</section>

<section id="recognised"><h2>{{ titles.recognised }}</h2>
{% if recognised %}
<p class="soft">A picture can be far from the truth pixel by pixel and still show who it is; and a prior that draws faces draws one whatever the update says. So every share stands
beside chance: what <em>the same picture</em> would score if a person drawn at random were the truth (“commonest” is what always naming the commonest class would score on
these images), beside controls and baselines, and beside what the same probe makes of clean images that it was not trained on: where it fails there, its silence means nothing.
In batches above 1 the pairs are chosen with the truth, which helps unrelated pictures as well, so no chance is stated: compare with the controls. One picture for a whole batch
counts once, against the batch's commonest label, and so do the mean images beside it; shares of single images do not hold for such labels, so what the same picture would score
by chance is not stated either. Faces are found by scikit-image's cascade (chance: the larger rate on noise and on patches of photographs, of which a few show a face); classes
and people by linear discriminants trained on public images only; people stand in a public gallery that holds none of the images under attack, up to recompression and mirroring.
Counts are of images: those of one client may show one person, so they are not independent.</p>
{% else %}<p class="note">Nothing was looked for (score.recognise, for example ["face", "attribute:male", "identity"]).</p>{% endif %}
{% for table in recognised %}
<div class="scroll" tabindex="0" role="region" aria-label="What can be recognised, {{ table.case }}"><table class="numbers sortable"><caption>{{ table.case }}</caption>
<thead><tr><th scope="col">Attack</th>{% for title, note in table.heads %}<th scope="col" class="n">{{ title }}<small>{{ note }}</small></th>{% endfor %}</tr></thead>
{% for defense, lines in table.blocks %}
<tbody><tr class="defense"><th scope="rowgroup" colspan="{{ 1 + table.heads|length }}">{{ defense|defense }}</th></tr>
{% for line in lines %}
<tr{% if line.cell.baseline_kind %} class="base"{% endif %}><th scope="row" class="name">{{ attack_name(line.cell) }}</th>
{% for entry in line.entries %}<td class="n" data-v="{{ '' if entry.value is none else entry.value }}">{{ entry.shown }}{% if entry.note %}<small>{{ entry.note }}</small>{% endif %}</td>{% endfor %}

</tr>
{% endfor %}
</tbody>
{% endfor %}
<tbody><tr class="defense"><th scope="rowgroup" colspan="{{ 1 + table.heads|length }}">yardsticks</th></tr>
{% for name, figures in table.yardsticks %}
<tr class="base"><th scope="row" class="name">{{ name }}</th>{% for figure in figures %}<td class="n">{{ figure }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if table.notes %}<p class="soft">{{ table.notes|join(" ") }}</p>{% endif %}
{% endfor %}
</section>

<section id="bounds"><h2>{{ titles.bounds }}</h2>
<p class="soft">What can be said of a model and its state before any attack. RV is the Frobenius norm of ∂update/∂image, at the attacked images. (a) Whatever fits a
noisy update as well as it can errs by at least σ/RV; (b), Cramér-Rao, is the floor above: the PSNR left to the best unbiased attack without a prior. Both are means in dB
over the same updates, from their truths, for each clipping by itself; dots are the attacks' mean PSNR, one for each defense that adds noise (without noise there is no place on the axis). A dot above (b)
is what prior, bias or the range [0, 1] are worth. (a) is never below (b).</p>
{% if not bounds and not ranking %}<p class="note">No update has both a floor and noise that it could be drawn against.</p>{% endif %}
{% if bounds %}<div class="charts">
{% for chart in bounds %}
<figure><figcaption>{{ chart.title }}<small>{{ chart.note }}</small></figcaption>{{ chart.svg }}{{ chart.legend }}</figure>
{% endfor %}
</div>{% endif %}
{% if ranking %}
<h3>Which model leaks most</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Which model leaks most"><table class="numbers sortable">
<thead><tr><th scope="col">Model and state</th><th scope="col" class="n">Updates</th><th scope="col" class="n">Largest RV<small>rank</small></th><th scope="col" class="n">Largest RV, of an update of rms 1<small>rank</small></th>
<th scope="col" class="n">Bound (b), dB<small>rank</small></th><th scope="col" class="n">Measured, dB<small>rank</small></th><th scope="col">Best attack</th></tr></thead><tbody>
{% for line in ranking.lines %}
<tr><th scope="row" class="name">{{ line.case }}<small>{{ line.about }}</small></th><td class="n">{{ line.updates }}</td>
{% for figure in line.figures %}
<td class="n" data-v="{{ figure.value if figure.value is not none else "" }}">{{ figure.shown }}{% if figure.rank %}<small>{{ figure.rank }}</small>{% endif %}</td>
{% endfor %}
<td>{{ line.best }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="soft">{{ ranking.note }}</p>
{% if ranking.correlations %}<p>Spearman's rank correlation with the measured PSNR over {{ ranking.lines|length }} models and states: {{ ranking.correlations|join("; ") }}.</p>{% endif %}
{% endif %}
</section>

<section id="way"><h2>{{ titles.way }}</h2>
<p class="soft">Images that an attack kept of its way, compared with the truth afterwards: the mean over all images of all its jobs. An attack keeps images of a few steps
only: each chart says how many its metric was taken at, while the attack's own distance is drawn from its whole record. LPIPS is better low, PSNR and SSIM high. Where PSNR falls while the distance to the
update still does, the attack fits the noise. The best step is known to the auditor, never to the attack, so its PSNR is no result.</p>
{% if not ways %}<p class="note">No attack kept images of its way.</p>{% endif %}
{% for case, blocks in ways %}
<h3>{{ case }}</h3>
{% for block in blocks %}
<h4>{{ block.title }}</h4>
<div class="charts">
{% for chart in block.charts %}
<figure><figcaption>{{ chart.title }}<small>{{ chart.note }}</small></figcaption>{{ chart.svg }}{{ chart.legend }}</figure>
{% endfor %}
</div>
<div class="scroll" tabindex="0" role="region" aria-label="Ways of {{ block.title }}"><table class="numbers">
{{ heads(["Defense", "#Jobs", "#Best step", "#PSNR there, dB", "#PSNR at the end, dB", "#Lost since, dB"]) }}<tbody>
{% for line in block.lines %}
<tr><th scope="row" class="name">{{ line.defense|defense }}</th><td class="n">{{ line.jobs }}</td><td class="n">{{ line.step }} of {{ line.steps }}</td><td class="n">{{ line.best|db }}</td><td class="n">{{ line.end|db }}</td><td class="n">{{ (line.best - line.end)|db }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% endfor %}
</section>

<section id="losses"><h2>{{ titles.losses }}</h2>
<p class="soft">Each attack's own loss, the only thing it may choose its result by. Losses of different attacks are not comparable; colours are defenses.</p>
{% if not loss_charts %}<p class="note">No attack recorded its loss.</p>{% endif %}
{% for case, charts in loss_charts %}
<h3>{{ case }}</h3><div class="charts">
{% for chart in charts %}
<figure><figcaption>{{ chart.title }}<small>{{ chart.note }}</small></figcaption>{{ chart.svg }}{{ chart.legend }}</figure>
{% endfor %}
</div>
{% endfor %}
</section>

<section id="knowledge"><h2>{{ titles.knowledge }}</h2>
<p class="soft">A real honest-but-curious server has none of the fields marked <span class="oracle">oracle</span>: results that used one are upper bounds.</p>
{% if knowledge %}
<div class="scroll" tabindex="0" role="region" aria-label="Knowledge per attack"><table class="numbers">
{{ heads(["Case", "Attack", "Threat model", "Known to the attacker", "#Jobs"]) }}<tbody>
{% for line in knowledge %}
<tr><th scope="row" class="name">{{ line.case }}</th><td>{{ line.attack }}</td><td>{{ line.threat_model or "–" }}</td>
<td>{% for field in line.oracles %}<span class="oracle">oracle: {{ field }}</span> {% endfor %}{{ line.known|join(", ") or ("" if line.oracles else "nothing recorded") }}</td><td class="n">{{ line.jobs }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}<p class="note">No attack rows.</p>{% endif %}
{% for prior in priors %}
<p class="{{ "alarm" if prior.same or prior.own else "note" }}">Prior {{ prior.name }}: {{ prior.about or "it does not say what it was trained on" }}.
{% if prior.own %}It was trained on the very images under attack.
{% elif prior.same is none %}Whether the attacked images are among its training images is not known{{ ": " + prior.reasons|join("; ") if prior.reasons }}.
{% else %}{{ prior.same }} of {{ prior.compared }} attacked images {{ "is" if prior.same == 1 else "are" }} among its training images (thumbnails, {{ "also" if prior.mirrored else "not" }} mirrored, were compared).{% if prior.reasons %} Others could not be compared: {{ prior.reasons|join("; ") }}.{% endif %}{% endif %}</p>
{% endfor %}
</section>

<section id="failures"><h2>{{ titles.failures }}</h2>
{% if unreadable %}<p class="alarm">Lines that could not be read and were skipped: {{ unreadable }}.</p>{% endif %}
{% if failures %}
<div class="scroll" tabindex="0" role="region" aria-label="Attacks without a result"><table class="numbers">
<caption>Attacks without a result</caption>{{ heads(["Case", "Defense", "Attack", "Status", "Reason", "#Jobs", "First"]) }}<tbody>
{% for line in failures %}
<tr><th scope="row" class="name">{{ line.case }}</th><td>{{ line.defense|defense }}</td><td>{{ line.attack }}</td><td>{{ line.status }}</td><td class="why">{{ line.error }}</td><td class="n">{{ line.jobs }}</td><td>{{ line.first }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}<p>Every attack gave a result.</p>{% endif %}
{% if failures_hidden %}<p class="soft">{{ failures_hidden|count("more kind") }} of failure not shown.</p>{% endif %}
{% if missing %}
<div class="scroll" tabindex="0" role="region" aria-label="Missing metrics"><table class="numbers">
<caption>Metrics that could not be computed</caption>{{ heads(["Case", "Metric", "Reason", "Attacks", "#Rows"]) }}<tbody>
{% for line in missing %}
<tr><th scope="row" class="name">{{ line.case }}</th><td>{{ line.metric }}</td><td class="why">{{ line.reason }}</td><td>{{ line.attacks }}</td><td class="n">{{ line.rows }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if incidents %}
<div class="scroll" tabindex="0" role="region" aria-label="Incidents"><table class="numbers">
<caption>Incidents: malformed replies and observers that failed</caption>{{ heads(["Case", "Federation", "Client", "Round", "Problems"]) }}<tbody>
{% for line in incidents %}
<tr><th scope="row" class="name">{{ line.case }}</th><td>{{ line.federation }}</td><td>{{ line.client }}</td><td>{{ line.round }}</td><td class="why">{{ line.problems }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if incidents_hidden %}<p class="soft">{{ incidents_hidden|count("more incident") }} not shown.</p>{% endif %}
{% else %}<p>No incidents were recorded.</p>{% endif %}
</section>

<section id="training"><h2>{{ titles.training }}</h2>
{% if not training %}<p class="note">No training history was recorded.</p>{% endif %}
{% if training %}<p class="soft">The cost of a defense is its last test accuracy minus the mean of those of the case's federations without one.</p>{% endif %}
{% for block in training %}
<h3>{{ block.case }}</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Training of {{ block.case }}"><table class="numbers">
<thead><tr><th scope="col">Federation</th><th scope="col">Defense</th><th scope="col" class="n">Rounds</th><th scope="col" class="n">Test accuracy, last round</th><th scope="col" class="n">Cost of the defense<small>percentage points</small></th><th scope="col" class="n">Test loss, last round</th><th scope="col" class="n">Train loss, last round</th></tr></thead><tbody>
{% for line in block.lines %}
<tr><th scope="row" class="name">{{ line.federation or "–" }}</th><td>{{ line.defense|defense if line.defense else "–" }}</td><td class="n">{{ line.rounds }}</td><td class="n">{{ line.accuracy }}</td><td class="n">{{ line.cost }}</td><td class="n">{{ line.test_loss|small }}</td><td class="n">{{ line.train_loss|small }}</td></tr>
{% endfor %}
</tbody></table></div>
<div class="charts">
{% for chart in block.charts %}
<figure><figcaption>{{ chart.title }}{% if chart.note %}<small>{{ chart.note }}</small>{% endif %}</figcaption>{{ chart.svg }}{{ chart.legend }}</figure>
{% endfor %}
</div>
{% endfor %}
</section>

<section id="samples"><h2>{{ titles.samples }}</h2>
{% if samples %}
<p class="soft">Images that the diffusion model draws after a round, always from the same noise: [−1, 1] shown as [0, 1], never stretched, enlarged by a whole factor.
Shown with the standard deviation of their pixels. Models that see private images can also memorise them: look for faces you know.</p>
{% else %}<p class="note">No samples were drawn (checkpoint.samples, for diffusion models only).</p>{% endif %}
{% for block in samples %}
<article class="card"><h3>{{ block.case }} · {{ block.defense|defense }}</h3>
<p class="soft">{{ block.federation }}{% if block.note %}: {{ block.note }}{% endif %}</p>
<div class="grids strip">{% for frame in block.frames %}{{ picture(frame) }}{% endfor %}</div>
{% if block.hidden %}<p class="soft">{{ block.hidden|count("more round") }} not shown.</p>{% endif %}
</article>
{% endfor %}
</section>

<section id="provenance"><h2>{{ titles.provenance }}</h2>
{% if facts %}
<dl class="facts">{% for key, value in facts %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% endif %}
{% if versions %}
<details><summary>Versions</summary><dl class="facts">{% for key, value in versions %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></details>
{% endif %}
{% if config %}<details open><summary>Configuration, resolved</summary><pre>{{ config }}</pre></details>{% else %}<p class="note">No config.toml in the run folder.</p>{% endif %}
</section>
</main>
<footer><p><strong>Keep this folder private.</strong> The pictures are private images and reconstructions of them. Audit only data that you own or may use for
research, and share the numbers rather than the pictures.</p></footer>
<script>{{ script }}</script>
</body>
</html>
"""
