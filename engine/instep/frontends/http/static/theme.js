// A classic script in the head, so that the page is never painted in the other theme first.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("instep-theme"); } catch { return null; } };
  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const changed = () => dispatchEvent(new Event("themechange"));
  if (stored()) root.dataset.theme = stored();
  system.addEventListener("change", changed);
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem("instep-theme", root.dataset.theme); } catch { /* it holds for this page only */ }
      changed();
    });
  });
})();
