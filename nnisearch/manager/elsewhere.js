// Trials that run on other machines: the hooks that local.js calls.
"use strict";

module.exports = function () {
    return undefined;
};
